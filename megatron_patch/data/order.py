"""Which rows make the global batch at a position: the only thing that decides it is the number of samples consumed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from data_tools.files.errors import DataError


class SampleOrder:
    """Segments one after the other, segment k permuted by the seed `seed + k`; what a batch cannot fill is left out.

    The permutation is the authors' `np.random.seed(11111 + k); np.random.permutation(rows)`. One segment's permutation
    is in memory, the next one is made ahead by a thread.

    Attributes:
        steps_per_segment: whole batches a segment gives.
        total_steps: batches of all segments.
    """

    def __init__(self, num_segments: int, rows_per_segment: int, global_batch_size: int, seed: int) -> None:
        """Raises DataError where a segment has fewer rows than one batch."""
        if rows_per_segment < global_batch_size:
            raise DataError(
                f"{rows_per_segment} rows a segment are fewer than one global batch of {global_batch_size}",
                file="data set",
                remedy="use a smaller global batch size or fewer segments",
            )
        self.num_segments = num_segments
        self.rows_per_segment = rows_per_segment
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.steps_per_segment = rows_per_segment // global_batch_size
        self.total_steps = num_segments * self.steps_per_segment
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sample-order")
        self._current: tuple[int, np.ndarray] | None = None
        self._next: tuple[int, Future[np.ndarray]] | None = None

    def batch(self, samples_consumed: int) -> tuple[int, np.ndarray]:
        """The global batch at a position.

        Args:
            samples_consumed: rows that came before; a multiple of the global batch size.

        Returns:
            The segment, and int64 [global_batch_size] row numbers in it.

        Raises:
            DataError: not a multiple of the global batch size, or beyond the last batch.
        """
        step, rest = divmod(samples_consumed, self.global_batch_size)
        if rest:
            raise DataError(
                f"{samples_consumed} samples consumed are no multiple of the global batch of {self.global_batch_size}",
                file="data set",
                place=f"step {step}",
                remedy="resume with the global batch size that the checkpoint was trained with",
            )
        if not 0 <= step < self.total_steps:
            raise DataError(
                f"{self.num_segments} segments of {self.rows_per_segment} rows give {self.total_steps} batches",
                file="data set",
                place=f"step {step}",
                remedy="train fewer steps or add segments",
            )
        segment, within = divmod(step, self.steps_per_segment)
        start = within * self.global_batch_size
        return segment, self._permutation(segment)[start : start + self.global_batch_size]

    def _permutation(self, segment: int) -> np.ndarray:
        if self._current is None or self._current[0] != segment:
            ahead = self._next
            made = ahead[1].result() if ahead and ahead[0] == segment else self._permute(segment)
            self._current = (segment, made)
            following = segment + 1
            self._next = None
            if following < self.num_segments:
                self._next = (following, self._thread.submit(self._permute, following))
        return self._current[1]

    def _permute(self, segment: int) -> np.ndarray:
        return np.random.RandomState(self.seed + segment).permutation(self.rows_per_segment)

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
