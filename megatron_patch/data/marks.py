"""What a data set holds of a row beyond its ids: which of them count in the loss, where conversations begin, images.

Whatever else belongs to a row is one more field of `Marks`, read by `Segments.marks`
beside the ids and sharded over data-parallel ranks with them; a data set without them is never asked for any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Marks(NamedTuple):
    """Of rows [...]; padding rows count nowhere and are one conversation."""

    counted: np.ndarray
    """bool [..., row_length]: whether the loss of predicting this id counts."""
    starts: np.ndarray
    """bool [..., row_length]: whether a conversation, or the padding after the last one, begins with this id."""
    images: np.ndarray | None = None
    """int32 [..., images a row]: the numbers of its images in their order, -1 behind them; None without images."""

    def of(self, rows: Sequence[int] | np.ndarray) -> Marks:
        """Those of some rows, by their places."""
        images = None if self.images is None else self.images[rows]
        return Marks(self.counted[rows], self.starts[rows], images)

    def placed(self, real: np.ndarray) -> Marks:
        """These marks of rows [n, row_length] at the n true places of `real` [...], padding rows at the others."""
        shape = (*real.shape, self.counted.shape[-1])
        counted, starts = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        starts[..., 0] = True
        counted[real], starts[real] = self.counted, self.starts
        if self.images is None:
            return Marks(counted, starts)
        images = np.full((*real.shape, self.images.shape[-1]), -1, dtype=self.images.dtype)
        images[real] = self.images
        return Marks(counted, starts, images)


class Boundaries(NamedTuple):
    """Where the conversations of a micro-batch lie, its rows one after the other."""

    cumulative: np.ndarray
    """int32 [n + 1]: the first token of each conversation, and the number of tokens."""
    positions: np.ndarray
    """int64 [tokens]: of each token in its conversation, from 0."""


def boundaries(starts: np.ndarray) -> Boundaries:
    """Of starts bool [b, s], each row's first token among them."""
    flat = starts.reshape(-1)
    first = np.flatnonzero(flat)
    index = np.arange(len(flat))
    cumulative = np.append(first, len(flat)).astype(np.int32)
    return Boundaries(cumulative, index - first[np.cumsum(flat) - 1])
