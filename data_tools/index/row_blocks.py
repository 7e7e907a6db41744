"""Rows of a segment's files, a block at a time, for checks of files that are larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from data_tools.files.plain_file import read_exactly

BLOCK_ROWS = 1024


class FirstRows:
    """Of each kind of fault in a file its first row, found block by block."""

    def __init__(self, remedy: str) -> None:
        self._remedy, self._first = remedy, dict[tuple[Path, str], int]()

    def note(self, start: int, *checks: tuple[Path, np.ndarray | np.bool, str]) -> None:
        """(file, bool [rows] where it is bad, what is wrong) of the block that begins with row `start`."""
        for path, bad, what in checks:
            if bad.any():
                self._first.setdefault((path, what), start + int(bad.argmax()))

    def faults(self) -> Iterator[str]:
        """One line a fault, with its remedy."""
        yield from (f"{path}: row {row}: {what}\n  remedy: {self._remedy}" for (path, what), row in self._first.items())


def row_blocks(rows: int, *files: tuple[Path, int, np.dtype]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """The first row's number and, of each (file, values a row, type), the block's [rows, values], until the next one.

    Read, not mapped: a bad disk is an error, not the end of the process.

    Raises:
        DataError: a file ends before its last row.
    """
    blocks = [np.empty((min(rows, BLOCK_ROWS), width), dtype) for _, width, dtype in files]
    with ExitStack() as stack:
        streams = [stack.enter_context(path.open("rb", buffering=0)) for path, _, _ in files]
        for start in range(0, rows, BLOCK_ROWS):
            found = [block[: rows - start] for block in blocks]
            for stream, block, (path, _, _) in zip(streams, found, files, strict=True):
                read_exactly(stream, block.reshape(-1).view(np.uint8).data, path)
            yield start, found
