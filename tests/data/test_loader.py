"""All ranks together see each global batch once, in any layout; padding has zero weight; errors reach the caller."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from data_tools.dataset.format import SEED
from data_tools.files.errors import DataError
from megatron_patch.data.loader import HELD_OUT_SEGMENT, Loader, held_out_shards
from megatron_patch.data.order import SampleOrder
from megatron_patch.data.segments import open_segments
from megatron_patch.data.sharding import accumulation_steps, shard_of
from tests.data.conftest import ROW_LENGTH, ROWS, VOCAB

BATCH = 8


@pytest.mark.parametrize(
    ("batch", "ranks", "micro", "multiple_of", "expected"),
    [(800, 160, 5, 1, 1), (800, 152, 5, 1, 2), (8, 3, 1, 1, 3), (8, 3, 1, 2, 4), (7, 2, 2, 1, 2), (1, 4, 3, 1, 1)],
)
def test_every_rank_runs_the_same_number(batch: int, ranks: int, micro: int, multiple_of: int, expected: int) -> None:
    assert accumulation_steps(batch, ranks, micro, multiple_of) == expected


@pytest.mark.parametrize(("ranks", "micro", "multiple_of"), [(1, 8, 1), (2, 2, 1), (3, 1, 1), (3, 2, 2), (5, 3, 4)])
def test_shares_are_the_batch(ranks: int, micro: int, multiple_of: int) -> None:
    batch = np.random.RandomState(0).permutation(100)[:BATCH]
    count = accumulation_steps(BATCH, ranks, micro, multiple_of)
    shards = [shard_of(batch, rank, ranks, micro, count) for rank in range(ranks)]
    seen = np.concatenate([rows[weights > 0] for rows, weights in shards])
    assert sorted(seen.tolist()) == sorted(batch.tolist())
    for rank, (rows, weights) in enumerate(shards):
        assert rows.shape == weights.shape == (count, micro)
        np.testing.assert_array_equal(rows[weights > 0], batch[rank::ranks])
        assert (rows[weights == 0] == -1).all()


def loaders(folder, ranks: int, micro: int, samples_consumed: int = 0) -> list[Loader]:
    segments = open_segments(folder, row_length=ROW_LENGTH, vocab_size=VOCAB)
    return [
        Loader(
            segments,
            SampleOrder(segments.num_segments, segments.rows_per_segment, BATCH, SEED),
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            micro_batch_size=micro,
            num_micro_batches=accumulation_steps(BATCH, ranks, micro, 1),
            samples_consumed=samples_consumed,
        )
        for rank in range(ranks)
    ]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (2, 1), (3, 2)])
def test_the_ranks_together_read_the_global_batch(data_set, ranks: int, micro: int) -> None:
    folder, rows, _ = data_set
    order = SampleOrder(3, ROWS, BATCH, SEED)
    steps = list(zip(*loaders(folder, ranks, micro), strict=True))
    assert len(steps) == order.total_steps == 9
    for step, shards in enumerate(steps):
        segment, batch = order.batch(step * BATCH)
        seen = []
        for shard in shards:
            assert (shard.segment, shard.samples_consumed) == (segment, step * BATCH)
            real = shard.weights > 0
            np.testing.assert_array_equal(shard.tokens[real], rows[segment][shard.rows[real]])
            assert not shard.tokens[~real].any()
            seen += shard.rows[real].tolist()
        assert sorted(seen) == sorted(batch.tolist())


def test_resumed_anywhere_it_goes_on_as_if_never_stopped(data_set) -> None:
    folder, *_ = data_set
    whole = list(loaders(folder, 1, 4)[0])
    for step in range(len(whole) + 1):
        rest = list(loaders(folder, 1, 4, step * BATCH)[0])
        assert [shard.samples_consumed for shard in rest] == [shard.samples_consumed for shard in whole[step:]]
        for ours, theirs in zip(rest, whole[step:], strict=True):
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_an_error_of_the_thread_reaches_the_caller(data_set) -> None:
    folder, *_ = data_set
    with pytest.raises(DataError, match="no multiple"):
        next(loaders(folder, 1, 4, 3)[0])


def test_close_ends_the_thread(data_set) -> None:
    folder, *_ = data_set
    before = set(threading.enumerate())
    loader = loaders(folder, 1, 4)[0]
    next(loader)
    loader.close()
    assert not {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("loader")}
    with pytest.raises(StopIteration):
        next(loader)


def test_held_out_rows_are_dealt_like_batches(data_set) -> None:
    folder, _, held_out = data_set
    segments = open_segments(folder, row_length=ROW_LENGTH, vocab_size=VOCAB)
    seen = []
    for rank in range(2):
        shards = held_out_shards(
            segments,
            num_rows=6,
            global_batch_size=4,
            data_parallel_rank=rank,
            data_parallel_size=2,
            micro_batch_size=1,
            num_micro_batches=accumulation_steps(4, 2, 1, 1),
        )
        for shard in shards:
            assert shard.segment == HELD_OUT_SEGMENT
            assert shard.rows.shape == (2, 1)
            real = shard.weights > 0
            np.testing.assert_array_equal(shard.tokens[real], held_out[shard.rows[real]])
            seen += shard.rows[real].tolist()
    assert sorted(seen) == list(range(6))
