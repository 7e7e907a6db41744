"""A parameter that is replicated in a way MobiLlama has not: a gain on each head's query, inside attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_patch.model import attention, parameters
from megatron_patch.model.parameters import Whole
from megatron_patch.optim.groups import Replication
from megatron_patch.recipe import Model
from tests.ranks import RankFailed, run_ranks
from tests.toy import toy_recipe, toy_trainer, train_toy

STEPS = 4
GAIN = "self_attention.query_gain"


def give_queries_a_gain(of_heads: bool | None) -> None:
    """In this process: a weight [head size] on every head's query, named as whole tensor unless `of_heads` is None."""
    build, rotate, stock = attention.SelfAttention.__init__, attention.split_and_rotate, parameters.whole_tensors

    def with_gain(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.query_gain = torch.nn.Parameter(torch.ones(self.config.hidden_size // self.config.num_attention_heads))

    def forward(self: Any, hidden: torch.Tensor, mask: None, *, rotary_pos_emb: torch.Tensor, **_: Any) -> Any:
        attention.split_and_rotate = lambda *args: (lambda q, k, v: (q * self.query_gain, k, v))(*rotate(*args))
        return plain_forward(self, hidden, mask, rotary_pos_emb=rotary_pos_emb)

    def whole_tensors(model: Model) -> dict[str, Whole]:
        gains = (
            Whole(f"layers.{i}.{GAIN}", (model.head_dim,), None, "norm", (i,), of_heads=bool(of_heads))
            for i in range(model.num_layers)
        )
        return {**stock(model), **{gain.name: gain for gain in gains}}

    plain_forward = attention.SelfAttention.forward
    attention.SelfAttention.__init__, attention.SelfAttention.forward = with_gain, forward
    if of_heads is not None:
        parameters.whole_tensors = whole_tensors


def train_with_gain(overrides: list[str], of_heads: bool) -> dict[str, Any]:
    give_queries_a_gain(of_heads)
    return train_toy([*overrides, "optimizer.learning_rate=1e-2"], STEPS)


def build_with_unknown_gain() -> None:
    give_queries_a_gain(None)
    toy_trainer(toy_recipe())


@pytest.mark.parametrize("sequence", ["false", "true"])
def test_a_replica_whose_gradient_is_partial_is_summed_over_the_tensor_group(sequence):
    (alone,) = run_ranks(1, train_with_gain, [], True)
    layout = ["parallel.tensor=2", f"parallel.sequence={sequence}"]
    for answer in run_ranks(2, train_with_gain, layout, True):
        assert answer["replicas_equal"]
        assert answer["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        for i in range(4):
            ours, theirs = (a["parts"][f"layers.{i}.{GAIN}"] for a in (answer, alone))
            assert (ours - 1).norm() > 1e-3 and (ours - theirs).norm() < 1e-4 * (theirs - 1).norm()


def test_said_to_be_whole_it_would_part():
    """What the rule is for: the same weight without `of_heads` ends as another one on every tensor-parallel rank."""
    answers = run_ranks(2, train_with_gain, ["parallel.tensor=2"], False)
    assert not any(answer["replicas_equal"] for answer in answers)


def test_a_parameter_that_nobody_named_is_refused():
    with pytest.raises(RankFailed, match=r"query_gain is no whole tensor: name it layers.0.self_attention.query_gain"):
        run_ranks(1, build_with_unknown_gain)


@pytest.mark.parametrize(
    ("stages", "over_tensor", "owners"),
    [
        ((1,), False, {(1, 0), (1, 1)}),
        ((1,), True, {(1, 0)}),
        ((1, 2), False, {(1, 0), (1, 1)}),
        ((0, 2), True, {(0, 0)}),
    ],
)
def test_one_rank_counts_and_writes_each_part(stages, over_tensor, owners):
    replicas = Replication(stages, over_tensor, partial=False)
    held = {(stage, rank) for stage in stages for rank in range(2)}
    assert {place for place in held if replicas.is_owner(*place)} == owners
