"""Which rows make the global batch at a position: the only thing that decides it is the number of samples consumed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from data_tools.files.errors import DataError


class SampleOrder:
    """Segments one after the other, segment k permuted by the seed `seed + k`; what a batch cannot fill is left out.

    The permutation is the authors' `np.random.seed(11111 + k); np.random.permutation(rows)`. One segment's permutation
    is in memory, the next one is made ahead by a thread. Over several epochs the segments follow each other again,
    numbered on: visit v reads segment v % num_segments, permuted by `seed + v`.

    Attributes:
        steps_per_segment: whole batches that a visit of a segment gives.
        total_steps: batches of all segments in all epochs.
    """

    def __init__(
        self, num_segments: int, rows_per_segment: int, global_batch_size: int, seed: int, epochs: int = 1
    ) -> None:
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
        self._visits = epochs * num_segments
        self.total_steps = self._visits * self.steps_per_segment
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
                f"{self._visits} segments of {self.rows_per_segment} rows give {self.total_steps} batches",
                file="data set",
                place=f"step {step}",
                remedy="train fewer steps or add segments",
            )
        visit, within = divmod(step, self.steps_per_segment)
        start = within * self.global_batch_size
        return visit % self.num_segments, self._permutation(visit)[start : start + self.global_batch_size]

    def left_out(self, step: int) -> tuple[int, np.ndarray] | None:
        """The segment whose last batch is that of the 1-based `step`, and its row numbers that make no whole batch.

        None where `step` ends no segment, or one without such rows.
        """
        visit, within = divmod(step, self.steps_per_segment)
        used = self.steps_per_segment * self.global_batch_size
        if within or used == self.rows_per_segment:
            return None
        return (visit - 1) % self.num_segments, self._permute(visit - 1)[used:]

    def _permutation(self, visit: int) -> np.ndarray:
        current, ahead = self._current, self._next  # the loader's thread asks too, perhaps for another visit
        if current is None or current[0] != visit:
            made = ahead[1].result() if ahead and ahead[0] == visit else self._permute(visit)
            self._current = current = (visit, made)
            following = visit + 1
            self._next = None
            if following < self._visits:
                self._next = (following, self._thread.submit(self._permute, following))
        return current[1]

    def _permute(self, visit: int) -> np.ndarray:
        return np.random.RandomState(self.seed + visit).permutation(self.rows_per_segment)

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
