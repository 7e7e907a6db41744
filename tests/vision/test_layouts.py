"""A model that sees trains in every layout as on one rank; frozen parts keep their bits."""

from __future__ import annotations

import pytest
import torch

from megatron_patch.model.initialise import initial_value
from megatron_patch.model.parameters import whole_tensors
from tests.ranks import run_ranks
from tests.toy import SEEING, gather, toy_recipe, train_toy
from tests.train.test_layouts import check, on_one_rank

STEPS = 10
RATES = ["optimizer.encoder_learning_rate=1e-4", "optimizer.projector_learning_rate=1e-3"]
WHOLE = [*SEEING, *RATES, "data.reset_at_starts=true"]
ALIGN = [*SEEING, "optimizer.frozen=[encoder,decoder]"]
LAYOUTS = {
    "TP2xPP2": (4, WHOLE, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "TP2xPP2xVPP2+SP": (4, WHOLE, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2",
                                   "parallel.sequence=true"]),
    "ZeRO-2 on DP3, micro-batches of 2, full recompute": (
        3, WHOLE, ["parallel.zero_stage=2", "batch.micro_batch_size=2", "recompute=full"]),
    "frozen, PP2xDP2": (4, ALIGN, ["parallel.pipeline=2"]),
    "frozen, TP2+SP": (2, ALIGN, ["parallel.tensor=2", "parallel.sequence=true"]),
}  # fmt: skip


SINGLY = {"TP2": ["parallel.tensor=2"], "PP2": ["parallel.pipeline=2"], "DP2": []}


@pytest.mark.soak
@pytest.mark.parametrize("layout", SINGLY)
def test_one_kind_of_parallelism_trains_as_one_rank(layout: str) -> None:
    overrides = [*WHOLE, *SINGLY[layout]]
    check(run_ranks(2, train_toy, overrides, STEPS), overrides, on_one_rank(*WHOLE), 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_as_one_rank(layout: str) -> None:
    ranks, model, overrides = LAYOUTS[layout]
    check(run_ranks(ranks, train_toy, [*model, *overrides], STEPS), [*model, *overrides], on_one_rank(*model), 1e-5)


@pytest.mark.parametrize("frozen", [("encoder", "decoder"), ("encoder",), ("decoder",), ()])
def test_frozen_parts_keep_their_bits(frozen: tuple[str, ...]) -> None:
    overrides = [*SEEING, f"optimizer.frozen=[{','.join(frozen)}]"]
    recipe = toy_recipe(*overrides)
    losses, _, weights = on_one_rank(*overrides)
    assert losses[-1] < losses[0]
    for name, whole in whole_tensors(recipe.model).items():
        before = initial_value(whole, recipe.seed, recipe.model.init_std)
        if not name.endswith("k_proj.bias"):  # whose gradient is none but rounding
            assert torch.equal(weights[name], before) == (whole.of in frozen), name


def test_each_part_has_its_learning_rate() -> None:
    """AdamW's first steps are as long as the learning rate, whatever the gradient."""
    overrides = [*SEEING, *RATES, "optimizer.weight_decay=0", "optimizer.warmup_steps=0"]
    recipe = toy_recipe(*overrides, "run.steps=1")
    weights = gather(run_ranks(1, train_toy, [*overrides, "optimizer.decay_steps=1000000"], 1), recipe)
    for name, whole in whole_tensors(recipe.model).items():
        moved = (weights[name] - initial_value(whole, recipe.seed, recipe.model.init_std)).abs().max().item()
        expected = {"encoder": 1e-4, "projector": 1e-3, "decoder": 3e-4}[whole.of]
        if not name.endswith("k_proj.bias"):
            assert moved == pytest.approx(expected, rel=0.1), name
