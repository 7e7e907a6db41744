"""Gradients reduced in buckets during backward: the same numbers as after it, and really during it."""

import pytest

from megatron_patch import gradients
from megatron_patch.model.parameters import whole_tensors
from tests.ranks import run_ranks
from tests.toy import gather, toy_recipe, toy_share, toy_trainer, train_toy

STEPS = 3
IN_BUCKETS, AFTER = "parallel.reduce_bucket=5000", "parallel.reduce_bucket=0"

LAYOUTS = {
    "DP2": (2, ["batch.micro_batch_size=1"]),
    "DP3, dedicated FFNs": (3, ["model.shared_ffn=false"]),
    "DP2, full recompute": (2, ["recompute=full"]),
    "DP2, selective recompute, bf16": (2, ["recompute=selective", "precision=bf16"]),
    "ZeRO-2 on DP2": (2, ["parallel.zero_stage=2"]),
    "PP2xDP2": (4, ["parallel.pipeline=2"]),
    "PP2xVPP2xDP2": (4, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "TP2+SPxDP2": (4, ["parallel.tensor=2", "parallel.sequence=true"]),
    "no decay of norms and embeddings": (2, ["optimizer.decay_everything=false"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_numbers(layout):
    ranks, overrides = LAYOUTS[layout]
    during = run_ranks(ranks, train_toy, [*overrides, IN_BUCKETS], STEPS)
    after = run_ranks(ranks, train_toy, [*overrides, AFTER], STEPS)
    # The sum over ranks is gloo's either way, but over other boundaries: its order may differ.
    for key in ("losses", "norms"):
        assert during[0][key] == pytest.approx(after[0][key], rel=1e-6)
    recipe = toy_recipe(*overrides)
    weights, expected = gather(during, recipe), gather(after, recipe)
    for name, tensor in weights.items():
        assert (tensor - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    assert all(answer["replicas_equal"] for answer in during)


def started(overrides: list[str]) -> list[tuple[str, list[str]]]:
    """(when, names of the bucket's tensors) of each reduction of a step, in order."""
    trainer = toy_trainer(toy_recipe(*overrides))
    groups = dict(zip(map(id, trainer.optimizer.buffers), trainer.optimizer.groups, strict=True))
    events, when = [], ["during"]
    start, reduce = gradients.GradientBuffer._start, trainer.optimizer.reduce_gradients

    def recording(buffer):
        events.append((when[0], [whole.name for whole in groups[id(buffer)].wholes]))
        start(buffer)

    def reduce_gradients():
        when[0] = "after"
        reduce()

    gradients.GradientBuffer._start = recording
    trainer.optimizer.reduce_gradients = reduce_gradients
    trainer.step(toy_share(trainer, 0), 1e-4)
    return events


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_all_but_embedding_and_norms_start_during_backward(recompute):
    events = run_ranks(2, started, ["model.shared_ffn=true", f"recompute={recompute}", IN_BUCKETS])[0]
    during = [names for when, names in events if when == "during"]
    after = {name for when, names in events if when == "after" for name in names}
    assert len(during) > 2
    assert during[0][0] == "output_layer.weight"
    assert during[-1] == ["ffn.linear_fc1.weight", "ffn.linear_fc2.weight"]  # the last whose gradient is whole
    assert after == {n for n in whole_tensors(toy_recipe().model) if "norm" in n or "embedding" in n}
    layers = [int(name.split(".")[1]) for names in during for name in names if name.startswith("layers.")]
    assert layers == sorted(layers, reverse=True)
    assert len([name for names in during for name in names]) + len(after) == len(whole_tensors(toy_recipe().model))


def test_every_bucket_is_reduced_once_and_by_all_ranks_in_one_order():
    for overrides in ([], ["parallel.pipeline=2"], ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]):
        ranks = 4 if overrides else 2
        answers = run_ranks(ranks, started, [*overrides, IN_BUCKETS])
        for rank in range(0, ranks, 2):  # neighbours are of one data-parallel group
            assert answers[rank] == answers[rank + 1]
            names = [name for _, bucket in answers[rank] for name in bucket]
            assert len(names) == len(set(names))
