"""Which fragments a rank writes: one copy of everything, without asking any other rank.

The shared FFN is written by the first pipeline stage, norms by tensor rank 0, everything else by the rank that holds
it; among data-parallel ranks each writes its own ZeRO shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.model.parameters import Whole
from megatron_patch.optim.groups import ParameterGroup
from megatron_patch.optim.zero import ShardedOptimizer
from megatron_patch.parallel.topology import Topology
from megatron_patch.train.checkpoint.format import Fragment


@dataclass(frozen=True)
class ShardRange:
    """Elements [low, high) of a data-parallel shard: elements from `start` on of a local parameter, flattened."""

    whole: Whole
    start: int
    low: int
    high: int

    @property
    def stop(self) -> int:
        return self.start + self.high - self.low


def shard_ranges(
    wholes: Sequence[Whole], offsets: Sequence[int], lengths: Sequence[int], data_rank: int, shard_length: int
) -> Iterator[ShardRange]:
    """What of each parameter lies in one data-parallel rank's shard of a flat group.

    `offsets` and `lengths` place the parameters in the flat group; padding belongs to none of them.
    """
    first, last = data_rank * shard_length, (data_rank + 1) * shard_length
    for whole, offset, length in zip(wholes, offsets, lengths, strict=True):
        low, high = max(offset, first), min(offset + length, last)
        if low < high:
            yield ShardRange(whole, low - offset, low - first, high - first)


def local_ranges(optimizer: ShardedOptimizer, group: int, data_rank: int) -> Iterator[ShardRange]:
    """What of each parameter of a group lies in this data-parallel rank's shard."""
    parameters, flat = optimizer.groups[group].parameters, optimizer.zero.bit16_groups_flat[group]
    offsets = [p.storage_offset() - flat.storage_offset() for p in parameters]
    lengths = [p.numel() for p in parameters]
    return shard_ranges(
        optimizer.groups[group].wholes, offsets, lengths, data_rank, optimizer.master_shards[group].numel()
    )


def is_writer(group: ParameterGroup[Any], topology: Topology) -> bool:
    """Whether this rank's copy of the group is the one that is written."""
    if group.replication == "ffn":
        return topology.pipeline_rank == 0
    return group.replication != "norm" or topology.tensor_rank == 0


def fragment(piece: ShardRange, tensor_rank: int, tensor_size: int) -> Fragment:
    """The name under which a piece is stored."""
    part, parts = (0, 1) if piece.whole.cut is None else (tensor_rank, tensor_size)
    return Fragment(piece.whole.name, part, parts, piece.start, piece.high - piece.low)
