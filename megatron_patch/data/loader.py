"""A data-parallel rank's shard of each global batch, read ahead by a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data_tools.dataset.format import TOKEN_DTYPE
from megatron_patch.data.images import Images
from megatron_patch.data.marks import Marks
from megatron_patch.data.order import SampleOrder
from megatron_patch.data.segments import Segments
from megatron_patch.data.sharding import shard_of

HELD_OUT_SEGMENT = -1


@dataclass(frozen=True)
class BatchShard:
    """What one rank reads of one global batch."""

    segment: int
    """Number of the segment; `HELD_OUT_SEGMENT` for held-out rows."""
    samples_consumed: int
    """Samples consumed before this batch."""
    rows: np.ndarray
    """int64 [num_micro_batches, micro_batch_size] row numbers in the segment, -1 where padded."""
    tokens: np.ndarray
    """uint16 [num_micro_batches, micro_batch_size, row_length]; zeros where padded."""
    weights: np.ndarray
    """float32 [num_micro_batches, micro_batch_size]; 1 for rows, 0 for padding."""
    labels: int
    """Labels of the whole global batch, over all ranks, whose loss counts: what the summed loss is divided by."""
    marks: Marks | None = None
    """Of `tokens`, where the data set says more of a row than its ids."""
    pixels: list[np.ndarray] | None = None
    """Of each micro-batch the images in the order of its rows: uint8 [n, 3, size, size]; None where none are read."""


def _read_shard(
    read: Callable[[np.ndarray], np.ndarray], rows: np.ndarray, weights: np.ndarray, row_length: int
) -> np.ndarray:
    real = weights > 0
    if real.all():
        return read(rows.ravel()).reshape(*rows.shape, row_length)
    tokens = np.zeros((*rows.shape, row_length), dtype=TOKEN_DTYPE)
    tokens[real] = read(rows[real])
    return tokens


def _labels_and_marks(
    read: Callable[[np.ndarray], Marks | None], batch: np.ndarray, rows: np.ndarray, row_length: int
) -> tuple[int, Marks | None]:
    """Labels that count in the rows of a global batch, and the marks of those that this rank reads.

    Every rank reads the marks of the whole batch, an eighth of a byte an id: none then needs to ask the others.
    """
    whole = read(batch)
    if whole is None:
        return len(batch) * (row_length - 1), None
    real = rows >= 0
    where = {int(row): place for place, row in enumerate(batch)}
    return int(whole.counted[:, 1:].sum()), whole.of([where[int(row)] for row in rows[real]]).placed(real)


def _pixels(images: Images | None, tokens: np.ndarray, marks: Marks | None) -> list[np.ndarray] | None:
    """Of each micro-batch the images of its rows, one row's after the other's."""
    if images is None or marks is None or marks.images is None:
        return None
    return [images.of_rows(*rows) for rows in zip(tokens, marks.images, strict=True)]


class Loader:
    """Iterates over the global steps from a position on; each `next` is a `BatchShard`, prefetched.

    Ends (StopIteration) after the last batch of the last segment. An error of the reading thread is raised by `next`.
    """

    def __init__(
        self,
        segments: Segments,
        order: SampleOrder,
        *,
        data_parallel_rank: int,
        data_parallel_size: int,
        micro_batch_size: int,
        num_micro_batches: int,
        samples_consumed: int,
        images: Images | None = None,
        prefetch: int = 2,
    ) -> None:
        """Starts reading at once.

        Args:
            num_micro_batches: see `sharding.accumulation_steps`.
            samples_consumed: the position; a multiple of the order's global batch size.
            images: where this rank needs the pixels of its rows' images.
            prefetch: batches kept ready.
        """
        self._segments, self._order, self._images = segments, order, images
        self._sharding = (data_parallel_rank, data_parallel_size, micro_batch_size, num_micro_batches)
        self._position = samples_consumed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")  # one thread: batches come in order
        self._ready: deque[Future[BatchShard]] = deque()
        for _ in range(prefetch):
            self._read_ahead()

    def __iter__(self) -> Iterator[BatchShard]:
        return self

    def __next__(self) -> BatchShard:
        if not self._ready:
            raise StopIteration
        shard = self._ready.popleft().result()
        self._read_ahead()
        return shard

    def close(self) -> None:
        """Ends the reading thread; the loader gives nothing more."""
        self._thread.shutdown(cancel_futures=True)
        self._ready.clear()

    def _read_ahead(self) -> None:
        if self._position < self._order.total_steps * self._order.global_batch_size:
            self._ready.append(self._thread.submit(self._shard, self._position))
            self._position += self._order.global_batch_size

    def _shard(self, samples_consumed: int) -> BatchShard:
        segment, batch = self._order.batch(samples_consumed)
        rows, weights = shard_of(batch, *self._sharding)
        tokens = _read_shard(lambda r: self._segments.read(segment, r), rows, weights, self._segments.row_length)
        labels, marks = _labels_and_marks(
            lambda r: self._segments.marks(segment, r), batch, rows, self._segments.row_length
        )
        pixels = _pixels(self._images, tokens, marks)
        return BatchShard(segment, samples_consumed, rows, tokens, weights, labels, marks, pixels)


def held_out_shards(
    segments: Segments,
    *,
    num_rows: int,
    global_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    micro_batch_size: int,
    num_micro_batches: int,
    images: Images | None = None,
) -> Iterator[BatchShard]:
    """The first `num_rows` held-out rows (or all there are), sharded like training batches, the last one padded."""
    count = min(num_rows, segments.held_out_rows)
    for start in range(0, count, global_batch_size):
        batch = np.arange(start, min(start + global_batch_size, count))
        rows, weights = shard_of(batch, data_parallel_rank, data_parallel_size, micro_batch_size, num_micro_batches)
        tokens = _read_shard(segments.read_held_out, rows, weights, segments.row_length)
        labels, marks = _labels_and_marks(segments.held_out_marks, batch, rows, segments.row_length)
        pixels = _pixels(images, tokens, marks)
        yield BatchShard(HELD_OUT_SEGMENT, start, rows, tokens, weights, labels, marks, pixels)
