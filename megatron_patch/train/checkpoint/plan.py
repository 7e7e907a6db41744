"""Which fragments a rank writes: one copy of everything, without asking any other rank.

Of what is replicated the owner writes (`Replication` in optim/groups.py); among data-parallel ranks each writes its own
ZeRO shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_patch.model.parameters import Whole
from megatron_patch.optim.zero import ShardedOptimizer
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
    lengths = [p.numel() for p in optimizer.groups[group].parameters]
    return shard_ranges(
        optimizer.groups[group].wholes,
        optimizer.offsets(group),
        lengths,
        data_rank,
        optimizer.master_shards[group].numel(),
    )


def fragment(piece: ShardRange, tensor_rank: int, tensor_size: int) -> Fragment:
    """The name under which a piece is stored."""
    part, parts = (0, 1) if piece.whole.cut is None else (tensor_rank, tensor_size)
    return Fragment(piece.whole.name, part, parts, piece.start, piece.high - piece.low)
