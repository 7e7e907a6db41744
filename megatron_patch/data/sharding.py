"""How a global batch is sharded across data-parallel ranks so that every rank runs the same number of micro-batches."""

from __future__ import annotations

import numpy as np

from megatron_patch.recipe import Recipe


def micro_batches(recipe: Recipe, data_parallel_size: int) -> int:
    """Micro-batches that every rank runs a step; the interleaved schedule wants a multiple of the pipeline's size."""
    parallel, batch = recipe.parallel, recipe.batch
    multiple = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
    return accumulation_steps(batch.global_batch_size, data_parallel_size, batch.micro_batch_size, multiple)


def accumulation_steps(global_batch_size: int, data_parallel_size: int, micro_batch_size: int, multiple_of: int) -> int:
    """Micro-batches that every rank runs for one global batch, rounded up to a multiple of `multiple_of`."""
    largest_shard = -(-global_batch_size // data_parallel_size)
    needed = -(-largest_shard // micro_batch_size)
    return -(-needed // multiple_of) * multiple_of


def shard_of(
    batch: np.ndarray, data_parallel_rank: int, data_parallel_size: int, micro_batch_size: int, num_micro_batches: int
) -> tuple[np.ndarray, np.ndarray]:
    """A data-parallel rank's shard of a global batch: positions rank, rank + size, rank + 2 * size, ...

    Args:
        batch: int64 [n] row numbers, n at most the global batch size.

    Returns:
        int64 [num_micro_batches, micro_batch_size] row numbers, -1 where padded, and float32 weights of the same shape,
        1 for rows and 0 for padding.
    """
    mine = batch[data_parallel_rank::data_parallel_size]
    rows = np.full(num_micro_batches * micro_batch_size, -1, dtype=np.int64)
    rows[: len(mine)] = mine
    shape = (num_micro_batches, micro_batch_size)
    return rows.reshape(shape), (rows >= 0).astype(np.float32).reshape(shape)
