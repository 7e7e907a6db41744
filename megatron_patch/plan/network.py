"""Bytes that one rank sends in a step, from a recipe's shapes; tests/plan/ compares them with real ranks.

What is counted follows the code: one reduce-scatter and one all-gather for each flat parameter group (gradients.py,
weights.py), the sums over replicas, and what tensor- and pipeline-parallel ranks exchange (Megatron-Core). How long
they take: collectives.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_patch.kernels.chunk import CHUNK_TOKENS
from megatron_patch.plan.collectives import Operation
from megatron_patch.plan.memory import FP32, Place, trained_groups


@dataclass(frozen=True)
class Traffic:
    """A kind of collective of one step, as one rank sees it."""

    group: Literal["data", "tensor", "pipeline"]
    what: str
    operation: Operation
    size: int  # ranks of the group
    payload: int  # bytes a step, of the whole tensors
    calls: int  # collectives that carry them

    @property
    def sent(self) -> float:
        """Bytes that a rank puts on the wire: ring algorithms; a send goes once."""
        factor = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}.get(self.operation)
        return self.payload if factor is None else factor * self.payload * (self.size - 1) / self.size


def traffic(place: Place) -> list[Traffic]:
    """What one rank exchanges in a step, the sum of loss, norm, requests and joules apart (16 bytes)."""
    return [item for item in _traffic(place) if item.payload and item.size > 1]


def _traffic(place: Place) -> Iterator[Traffic]:
    p = place.recipe.parallel
    held, dp = trained_groups(place), place.data_size
    for groups, gradients, weights in (
        # What is reduced last is gathered first: layer 0 waits for it, and for the shared FFN, embedding and norms.
        ([g for g in held if g.during_backward], "gradients, in backward", "weights, in forward"),
        ([g for g in held if not g.during_backward], "gradients, after it", "weights, for layer 0"),
    ):
        size = sum(g.size for g in groups)
        yield Traffic("data", gradients, "reduce-scatter", dp, FP32 * size, len(groups))
        yield Traffic("data", weights, "all-gather", dp, place.element * size, len(groups))
    for group in held:
        size = FP32 * group.size // dp
        if group.replication.over_stages:
            yield Traffic("pipeline", "shared FFN's gradient", "all-reduce", len(group.replication.stages), size, 1)
        if group.replication.partial:
            yield Traffic("tensor", "norms' gradient", "all-reduce", p.tensor, size, 1)
    hops = 2 * p.virtual_pipeline - place.is_first - place.is_last  # forward and backward, ends excepted
    n = hops * place.micro_batches
    yield Traffic("pipeline", "activations", "send", p.pipeline, n * place.own_hidden_bytes, n)
    yield from _tensor_traffic(place)


def _tensor_traffic(place: Place) -> Iterator[Traffic]:
    r, tensor = place.recipe, place.recipe.parallel.tensor
    n, hidden = place.micro_batches, place.hidden_bytes
    # Attention and FFN each begin and end with one exchange; what is recomputed is exchanged again.
    again = {"none": 0, "selective": 1, "full": 2}[r.recompute]
    chunks = -(-place.tokens // CHUNK_TOKENS) * n * place.is_last
    yield Traffic(
        "tensor", "loss statistics", "all-reduce", tensor, 3 * FP32 * place.tokens * n * place.is_last, 2 * chunks
    )
    ends = place.is_first + place.is_last  # embedding forward, loss backward
    if not r.parallel.sequence:
        size = ((4 + again) * place.layers + ends) * n * hidden
        calls = ((4 + again) * place.layers + place.is_first) * n + chunks  # the loss's gradient chunk by chunk
        yield Traffic("tensor", "activations", "all-reduce", tensor, size, calls)
        return
    # Under sequence parallelism a block's input is gathered again for its weight gradient, and the embedding's gradient
    # for its own; frozen ones have none.
    frozen = "decoder" in r.optimizer.frozen
    gathers = ((6 - 2 * frozen + again) * place.layers + ends - frozen * place.is_first) * n
    scatters = ((4 + again) * place.layers + ends) * n
    yield Traffic("tensor", "activations", "all-gather", tensor, gathers * hidden, gathers)
    yield Traffic("tensor", "activations", "reduce-scatter", tensor, scatters * hidden, scatters)
