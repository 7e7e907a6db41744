"""The same model in every layout: same seed, same rows, same losses, norms and weights as on one rank."""

import functools

import pytest
import torch

from megatron_patch.model.initialise import initial_value
from megatron_patch.model.parameters import whole_tensors
from tests.ranks import run_ranks
from tests.toy import gather, toy_recipe, train_toy

STEPS = 10

# name: (ranks, overrides); micro-batches outnumber stages everywhere.
LAYOUTS = {
    "TP2": (2, ["parallel.tensor=2"]),
    "TP2+SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP2": (2, ["parallel.pipeline=2"]),
    "PP2xVPP2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "DP2": (2, []),
    "DP3, batch 8": (3, []),
    "PP2xDP3": (6, ["parallel.pipeline=2"]),
    "PP2xVPP2xDP3": (6, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "TP2xPP2xDP2+SP": (8, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]),
    "ZeRO-2 on DP2, 2 micro-batches": (2, ["parallel.zero_stage=2", "batch.micro_batch_size=2"]),
    "ZeRO-2 on DP2, full recompute": (2, ["parallel.zero_stage=2", "recompute=full"]),
    "PP2, selective recompute": (2, ["parallel.pipeline=2", "recompute=selective"]),
}
FFNS = {"shared": ["model.num_ffns=1"], "dedicated": ["model.num_ffns=null"]}


@functools.cache
def on_one_rank(*overrides: str):
    """(losses, norms, whole weights) of the reference layout."""
    answer = run_ranks(1, train_toy, list(overrides), STEPS)
    return answer[0]["losses"], answer[0]["norms"], gather(answer, toy_recipe(*overrides))


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def check(answers, overrides, reference, tolerance):
    losses, norms, weights = reference
    for answer in answers:
        assert answer["replicas_equal"], "a parameter differs between ranks that hold the same part of it"
        assert (answer["losses"], answer["norms"]) == (answers[0]["losses"], answers[0]["norms"])
    assert max(map(relative, answers[0]["losses"], losses)) < tolerance
    assert max(map(relative, answers[0]["norms"], norms)) < tolerance
    for name, tensor in gather(answers, toy_recipe(*overrides)).items():
        if name.endswith("k_proj.bias"):
            continue  # softmax takes the same from all keys: its gradient is rounding, of which Adam makes whole steps
        assert (tensor - weights[name]).norm() <= tolerance * weights[name].norm(), name


@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_as_one_rank(layout, ffn):
    ranks, overrides = LAYOUTS[layout]
    overrides = [*FFNS[ffn], *overrides]
    check(run_ranks(ranks, train_toy, overrides, STEPS), overrides, on_one_rank(*FFNS[ffn]), 1e-5)


@pytest.mark.parametrize("layout", ["TP2+SP", "PP2", "DP3, batch 8", "PP2xVPP2xDP3", "TP2xPP2xDP2+SP"])
def test_rows_of_conversations_train_as_on_one_rank(layout):
    ranks, overrides = LAYOUTS[layout]
    packed = ["data.reset_at_starts=true", "model.num_ffns=1"]
    overrides = [*packed, *overrides]
    check(run_ranks(ranks, train_toy, overrides, STEPS), overrides, on_one_rank(*packed), 1e-5)


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [(4, ["parallel.pipeline=4"]), (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"])],
    ids=["PP4", "PP2xVPP2"],
)
def test_22_layers_split_unevenly(ranks, overrides):
    deep = ["model.num_layers=22", "model.num_ffns=1"]
    check(run_ranks(ranks, train_toy, [*deep, *overrides], STEPS), [*deep, *overrides], on_one_rank(*deep), 1e-5)


SIX = ["model.num_layers=6"]  # on three stages two FFNs in blocks change inside the second, four end where none does
GROUPS = {
    "2 in blocks, PP3": (3, ["parallel.pipeline=3"], [*SIX, "model.num_ffns=2"]),
    "4 in blocks, PP3": (3, ["parallel.pipeline=3"], [*SIX, "model.num_ffns=4"]),
    "2 by turns, PP2": (2, ["parallel.pipeline=2"], ["model.num_ffns=2", "model.ffn_pattern=cycle"]),
    "3 in blocks, PP2xVPP2": (
        2,
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
        ["model.num_ffns=3"],
    ),
    "3 by turns, TP2xPP2xDP2+SP": (
        8,
        ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"],
        [*SIX, "model.num_ffns=3", "model.ffn_pattern=cycle"],
    ),
    "2 in blocks, ZeRO-2 on DP2, full recompute": (
        2,
        ["parallel.zero_stage=2", "recompute=full", "parallel.reduce_bucket=5000"],
        ["model.num_ffns=2"],
    ),
}


@pytest.mark.parametrize("case", GROUPS)
def test_groups_of_layers_that_share_an_ffn(case):
    ranks, layout, model = GROUPS[case]
    overrides = [*model, *layout]
    check(run_ranks(ranks, train_toy, overrides, STEPS), overrides, on_one_rank(*model), 1e-5)


@pytest.mark.parametrize("layout", ["DP2", "PP2xDP3", "TP2xPP2xDP2+SP", "PP2xVPP2", "ZeRO-2 on DP2, 2 micro-batches"])
def test_bf16_trains_as_fp32(layout):
    ranks, overrides = LAYOUTS[layout]
    losses, norms, weights = on_one_rank("model.num_ffns=1")
    overrides = ["precision=bf16", "model.num_ffns=1", *overrides]
    answers = run_ranks(ranks, train_toy, overrides, STEPS)
    for answer in answers:
        assert answer["replicas_equal"]
        assert all(p.dtype == torch.bfloat16 for p in answer["parts"].values())
    assert max(map(relative, answers[0]["losses"], losses)) < 1e-3
    assert max(map(relative, answers[0]["norms"], norms)) < 1e-2
    recipe = toy_recipe(*overrides)
    trained = gather(answers, recipe)
    off = moved = 0.0
    for name, whole in whole_tensors(recipe.model).items():
        start = initial_value(whole, recipe.seed, recipe.model.init_std)
        off += (trained[name].float() - weights[name]).square().sum().item()
        moved += (weights[name] - start).square().sum().item()
    assert off < 0.05 * moved  # weights that never moved are off by all of it


def test_rank_count_that_the_layout_does_not_divide_is_refused():
    from megatron_patch.parallel.topology import data_parallel_size
    from megatron_patch.recipe import RecipeError

    with pytest.raises(RecipeError, match=r"6 ranks / \(parallel.tensor 2 x parallel.pipeline 2\) = 1.5"):
        data_parallel_size(toy_recipe("parallel.tensor=2", "parallel.pipeline=2").parallel, 6)
