"""Gradients reduced during backward, weights gathered under the next forward: the same numbers, and really then."""

import hashlib

import pytest
import torch.distributed as dist

from megatron_patch.model.parameters import local_parameters, whole_tensors
from megatron_patch.optim import gradients, weights
from megatron_patch.train.schedule import learning_rate
from tests.ranks import run_ranks
from tests.toy import gather, toy_recipe, toy_shard, toy_trainer, train_toy

STEPS = 3
IN_BUCKETS, AFTER = "parallel.reduce_bucket=5000", "parallel.reduce_bucket=0"

LAYOUTS = {
    "DP2": (2, ["batch.micro_batch_size=1"]),
    "DP3, dedicated FFNs": (3, ["model.num_ffns=null"]),
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
    trainer.step(toy_shard(trainer, 0), 1e-4)
    return events


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_all_but_embedding_and_norms_start_during_backward(recompute):
    events = run_ranks(2, started, ["model.num_ffns=1", f"recompute={recompute}", IN_BUCKETS])[0]
    during = [names for when, names in events if when == "during"]
    after = {name for when, names in events if when == "after" for name in names}
    assert len(during) > 2
    assert during[0][0] == "output_layer.weight"
    # The shared FFN is whole when layer 0's is through, under whose attention it is reduced.
    assert during[-2] == ["ffn.linear_fc1.weight", "ffn.linear_fc2.weight"]
    assert all(name.startswith("layers.0.self_attention") for name in during[-1])
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


class Late:
    """A gather that moves nothing until somebody waits for it."""

    begun, moved = 0, 0

    def __init__(self, *args, group):
        self._gather = lambda: REAL_GATHER(*args, group=group)
        Late.begun += 1

    def wait(self):
        self._gather()
        Late.moved += 1


REAL_GATHER = dist.all_gather_into_tensor


def gather_late(*args, group, async_op=False):
    return Late(*args, group=group) if async_op else REAL_GATHER(*args, group=group)


def train_gathering_late(overrides: list[str]) -> tuple[list[tuple[float, float]], dict, list[tuple[str, int, int]]]:
    """Losses and norms, final weights of this rank, and (where, gathers begun, gathers moved) along the last step."""
    recipe = toy_recipe(*overrides)
    trainer = toy_trainer(recipe)
    steps, seen = [], []
    weights.dist.all_gather_into_tensor = gather_late
    try:
        for number in range(STEPS):
            if number == STEPS - 1:
                for chunk in trainer.chunks:
                    for layer in chunk.decoder.layers:
                        layer.register_forward_pre_hook(
                            lambda layer, _: seen.append((f"layer {layer.layer_number}", Late.begun, Late.moved))
                        )
                seen.append(("start", Late.begun, Late.moved))
            trainer.compute(toy_shard(trainer, number))
            steps.append(trainer.update(learning_rate(number, recipe.optimizer, STEPS)))
        seen.append(("end", Late.begun, Late.moved))
        trainer.optimizer.gather()
    finally:
        weights.dist.all_gather_into_tensor = REAL_GATHER
    parts = {whole.name: p.detach().clone() for whole, p in local_parameters(trainer.chunks, recipe.model)}
    return [tuple(step.result()[:2]) for step in steps], parts, seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_whole_wherever_they_are_used(layout):
    ranks, overrides = LAYOUTS[layout]
    late = run_ranks(ranks, train_gathering_late, [*overrides, IN_BUCKETS])
    at_once = run_ranks(ranks, train_toy, [*overrides, IN_BUCKETS], STEPS)
    for (numbers, parts, _), expected in zip(late, at_once, strict=True):
        assert numbers == list(zip(expected["losses"], expected["norms"], strict=True))
        for name, part in parts.items():
            assert part.equal(expected["parts"][name]), name


def test_each_layer_waits_for_its_own_weights_alone():
    *_, seen = run_ranks(2, train_gathering_late, ["recompute=none", IN_BUCKETS])[0]
    _, begun, moved = seen[0]
    groups = (begun - moved) or pytest.fail("nothing was left to gather at the start of the step")
    moved_before = [m - moved for where, _, m in seen if where.startswith("layer")]
    assert groups > 4 and seen[0][0] == "start"
    assert 0 < moved_before[0] < groups, "the first layer waits for some groups and not for all"
    assert moved_before == sorted(moved_before)
    assert moved_before[2] < groups == moved_before[3], "the last layer's weights are the last, with the output layer's"
    _, begun_at_end, moved_at_end = seen[-1]
    assert begun_at_end - moved_at_end == groups, "the update waits for no gather"


def digests(overrides: list[str]) -> list[str]:
    """Of the flat weights after each step."""
    trainer = toy_trainer(toy_recipe(*overrides))
    answers = []
    for number in range(STEPS):
        trainer.step(toy_shard(trainer, number), 1e-3)
        flat = [t.detach().float().numpy().tobytes() for t in trainer.optimizer.flat_weights]
        answers.append(hashlib.sha256(b"".join(flat)).hexdigest())
    return answers


def test_a_step_leaves_the_same_weights_on_all_data_parallel_ranks():
    answers = run_ranks(3, digests, ["precision=bf16", IN_BUCKETS])
    assert answers[0] == answers[1] == answers[2] and len(set(answers[0])) == STEPS
