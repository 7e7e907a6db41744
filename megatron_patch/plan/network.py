"""Bytes that one rank sends in a step, from a recipe's shapes; tests/plan/ compares them with real ranks.

What is counted follows the code: one reduce-scatter and one all-gather for each flat parameter group (gradients.py,
weights.py), the sums over replicas, and what tensor- and pipeline-parallel ranks exchange (Megatron-Core).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_patch.plan.memory import FP32, Place, parameter_groups


@dataclass(frozen=True)
class Traffic:
    """A kind of collective of one step, as one rank sees it."""

    group: Literal["data", "tensor", "pipeline"]
    what: str
    operation: Literal["all-reduce", "all-gather", "reduce-scatter", "send"]
    size: int  # ranks of the group
    payload: int  # bytes a step, of the whole tensors
    hidden: bool = False  # runs beside computation

    @property
    def sent(self) -> float:
        """Bytes that a rank puts on the wire: ring algorithms; a send goes once."""
        factor = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}.get(self.operation)
        return self.payload if factor is None else factor * self.payload * (self.size - 1) / self.size


def traffic(place: Place) -> list[Traffic]:
    """What one rank exchanges in a step, the sum of loss and norm apart (12 bytes)."""
    return [item for item in _traffic(place) if item.payload and item.size > 1]


def _traffic(place: Place) -> Iterator[Traffic]:
    p = place.recipe.parallel
    held = parameter_groups(place)
    flat, dp = sum(group.size for group in held), place.data_size
    early = sum(group.size for group in held if group.during_backward)
    ffn, norms = (sum(group.size for group in held if group.replication == kind) for kind in ("ffn", "norm"))
    yield Traffic("data", "gradients, in backward", "reduce-scatter", dp, FP32 * early, hidden=True)
    yield Traffic("data", "gradients, after it", "reduce-scatter", dp, FP32 * (flat - early))
    # What is reduced last is gathered first: layer 0 waits for it, and for the shared FFN, embedding and norms.
    yield Traffic("data", "weights, for layer 0", "all-gather", dp, place.element * (flat - early))
    yield Traffic("data", "weights, in forward", "all-gather", dp, place.element * early, hidden=True)
    yield Traffic("pipeline", "shared FFN's gradient", "all-reduce", p.pipeline, FP32 * ffn // dp)
    hops = 2 * p.virtual_pipeline - place.is_first - place.is_last  # forward and backward, ends excepted
    yield Traffic("pipeline", "activations", "send", p.pipeline, hops * place.own_hidden_bytes * place.micro_batches)
    yield from _tensor_traffic(place, norms)


def _tensor_traffic(place: Place, norms: int) -> Iterator[Traffic]:
    r, tensor = place.recipe, place.recipe.parallel.tensor
    n, hidden = place.micro_batches, place.hidden_bytes
    # Attention and FFN each begin and end with one exchange; what is recomputed is exchanged again.
    again = {"none": 0, "selective": 1, "full": 2}[r.recompute]
    yield Traffic("tensor", "loss statistics", "all-reduce", tensor, 3 * FP32 * place.tokens * n * place.is_last)
    if not r.parallel.sequence:
        ends = place.is_first + place.is_last  # embedding forward, loss backward
        yield Traffic("tensor", "activations", "all-reduce", tensor, ((4 + again) * place.layers + ends) * hidden * n)
        return
    # Under sequence parallelism a block's input is gathered again for its weight gradient.
    gathers = (6 + again) * place.layers + place.is_first + place.is_last
    scatters = (4 + again) * place.layers + place.is_first + place.is_last
    yield Traffic("tensor", "activations", "all-gather", tensor, gathers * hidden * n)
    yield Traffic("tensor", "activations", "reduce-scatter", tensor, scatters * hidden * n)
    yield Traffic("tensor", "norms' gradient", "all-reduce", tensor, FP32 * norms // place.data_size)
