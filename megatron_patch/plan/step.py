"""Seconds of a step: what a GPU computes, and what of the traffic no computation hides.

The last micro-batch's backward pass, the update and the first micro-batch's forward pass are played through in the
order of the code (optim/gradients.py, optim/weights.py): a bucket's reduce-scatter starts when its lowest layer is
done and the one before is through, and a layer waits for the weights it uses. What tensor- and pipeline-parallel ranks
exchange is waited for. Not counted: that NCCL's kernels take some of the GPU from the computation they run beside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_patch.parallel.gpus import Gpu
from megatron_patch.plan.collectives import Kind, Operation, Span, seconds, span
from megatron_patch.plan.compute import Computation, computation, flops
from megatron_patch.plan.memory import FP32, Group, Place, trained_groups
from megatron_patch.plan.network import Traffic, traffic

NORM_BYTES = 3 * FP32  # the world-wide sum of loss, norm and requests


@dataclass(frozen=True)
class Step:
    """A pipeline stage's step by part, in seconds: work on rows, work on padding, and waits by what is waited for."""

    rows: float
    update: float
    padding: float
    waits: Mapping[str, float] = field(default_factory=dict)
    hidden: float = 0.0
    """Traffic under which the GPU computes; no part of the step."""

    @property
    def seconds(self) -> float:
        return self.rows + self.update + self.padding + self.waited

    @property
    def waited(self) -> float:
        return sum(self.waits.values())

    @property
    def bound_by(self) -> str:
        """The largest part after the work on rows, where it is worth a name."""
        what, most = max([("padding", self.padding), *self.waits.items()], key=lambda part: part[1])
        return what if most > 0.05 * self.seconds else "computation"


class Ranks:
    """A layout on a gpu: how its groups lie, and what a collective of one of them takes."""

    def __init__(self, place: Place, gpu: Gpu) -> None:
        p = place.recipe.parallel
        self._sizes = p.tensor, place.data_size, p.pipeline
        self._gpu = gpu
        self._only_rings = place.recipe.run.deterministic

    def span(self, kind: Kind) -> Span:
        return span(kind, *self._sizes, self._gpu.per_node)

    def seconds(self, kind: Kind, operation: Operation, payload: float, calls: int = 1) -> float:
        return seconds(operation, payload, self.span(kind), self._gpu.network, self._only_rings, calls)

    def of(self, item: Traffic) -> float:
        """Seconds of a kind of traffic, one collective after the other."""
        return self.seconds(item.group, item.operation, item.payload, item.calls)


def slowest_stage(places: Sequence[Place], gpu: Gpu, mfu: float | None = None) -> Step:
    """The step of a layout: of its slowest stage, which the others wait for.

    Args:
        places: one rank of each pipeline stage.
        mfu: model FLOP utilisation of the computation alone, in place of what was measured (compute.py).
    """
    factor = 1.0 if mfu is None else _factor(places, gpu, mfu)
    own = [_computation(place, gpu).scaled(factor) for place in places]
    exchanged = [_exchanged(place, Ranks(place, gpu)) for place in places]
    slowest = max(c.micro_batch + sum(e.values()) for c, e in zip(own, exchanged, strict=True))
    steps = [_step(place, Ranks(place, gpu), c, e, slowest) for place, c, e in zip(places, own, exchanged, strict=True)]
    return max(steps, key=lambda step: step.seconds)


def _factor(places: Sequence[Place], gpu: Gpu, mfu: float) -> float:
    """What all stages' computation must be multiplied with to reach `mfu` together."""
    computed = sum(_computation(place, gpu).micro_batch * place.micro_batches for place in places)
    computed += sum(_computation(place, gpu).update for place in places)
    return flops(places[0], places[0].micro_batches) / (gpu.peak_flops * mfu) / (computed / len(places))


def _computation(place: Place, gpu: Gpu) -> Computation:
    return computation(place, gpu, sum(group.size for group in trained_groups(place)))


def _exchanged(place: Place, ranks: Ranks) -> dict[str, float]:
    """Seconds of a micro-batch in which tensor- and pipeline-parallel ranks exchange activations."""
    waits: dict[str, float] = {}
    for item in traffic(place):
        if item.what in ("activations", "loss statistics"):
            name = f"{item.group} group"
            waits[name] = waits.get(name, 0.0) + ranks.of(item) / place.micro_batches
    return waits


def _step(place: Place, ranks: Ranks, own: Computation, exchanged: Mapping[str, float], slowest: float) -> Step:
    """`slowest`: seconds of a micro-batch on the slowest stage, its exchanges included."""
    p, n = place.recipe.parallel, place.micro_batches
    waits = {name: wait * n for name, wait in exchanged.items()}
    waits["bubble"] = (p.pipeline - 1) / p.virtual_pipeline * slowest + n * (
        slowest - own.micro_batch - sum(exchanged.values())
    )
    waits |= _data_waits(place, ranks, own)
    for item in traffic(place):  # sums of the shards over ranks that hold replicas
        if item.operation == "all-reduce" and item.what.endswith("gradient"):
            waits["replicas"] = waits.get("replicas", 0.0) + ranks.of(item)
    waits["norm"] = ranks.seconds("world", "all-reduce", NORM_BYTES)
    rows = place.recipe.batch.global_batch_size / place.data_size / place.recipe.batch.micro_batch_size
    all_data = sum(ranks.of(item) for item in traffic(place) if item.group == "data")
    return Step(
        rows=rows * own.micro_batch,
        update=own.update,
        padding=(n - rows) * own.micro_batch,
        waits={name: wait for name, wait in waits.items() if wait},
        hidden=all_data - waits["gradients"] - waits["weights"],
    )


def _data_waits(place: Place, ranks: Ranks, own: Computation) -> dict[str, float]:
    if place.data_size == 1:
        return {"gradients": 0.0, "weights": 0.0}
    groups = trained_groups(place)

    def duration(operation: Operation, element: int, group: Group) -> float:
        return ranks.seconds("data", operation, element * group.size)

    def whole(group: Group) -> float:
        """When its gradients are, seconds before the end of backward as a negative number."""
        attention = own.attention_backward if group.in_ffn else 0.0
        return -min(group.layers) * own.layer_backward - attention if group.layers else 0.0

    through = float("-inf")
    for group in sorted(groups, key=lambda group: (whole(group), not group.layers)):
        through = max(through, whole(group)) + duration("reduce-scatter", FP32, group)
    # Update and forward: time 0 is the update's begin.
    total, updated, free = sum(group.size for group in groups), 0.0, 0.0
    arrives: list[tuple[Group, float]] = []
    for group in sorted(groups, key=lambda group: group.turn):
        updated += own.update * group.size / total
        free = max(free, updated) + duration("all-gather", place.element, group)
        arrives.append((group, free))
    now = own.update
    for layer in range(place.layers):
        used = [(group, at) for group, at in arrives if layer in group.layers or not group.layers]
        now = max([now, *(at for group, at in used if not group.in_ffn)]) + own.attention_forward
        now = max([now, *(at for group, at in used if group.in_ffn)]) + own.ffn_forward
    now = max([now, *(at for _, at in arrives)])  # the output layer, which nothing else waits for
    return {
        "gradients": max(through, 0.0),
        "weights": max(now - own.update - place.layers * own.layer_forward, 0.0),
    }
