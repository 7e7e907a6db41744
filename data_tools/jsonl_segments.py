"""Amber's JSONL segments: their names, their lines, and what `mix` says of a folder of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools._core import RowParser
from data_tools.format import MAX_VOCAB_SIZE, SOURCES, DataError

MIX_MANIFEST = "mix.json"
JSONL_NAME = re.compile(r"train_(\d+)\.jsonl(\.gz|\.zst)?")


def jsonl_name(segment: int) -> str:
    """Name of a segment's JSONL: `train_007.jsonl`."""
    return f"train_{segment:03d}.jsonl"


def jsonl_lines(rows: np.ndarray, codes: np.ndarray) -> bytes:
    """Amber's JSONL for uint16 [n, row_length] rows and uint8 [n] source codes."""
    writer = RowParser(rows.shape[1], MAX_VOCAB_SIZE, list(SOURCES))
    return writer.format(np.ascontiguousarray(rows), np.ascontiguousarray(codes))


def list_segments(folder: Path) -> Iterator[tuple[int, Path]]:
    """The JSONL segments of a folder by number: `train_0`, `train_000`, plain, gz and zst.

    Raises:
        DataError: there is none, a number is twice there, or one is missing between others.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := JSONL_NAME.fullmatch(path.name):
            number = int(match[1])
            if number in found:
                raise DataError(f"is segment {number}, and so is {found[number].name}", file=path, remedy="remove one")
            found[number] = path
    if not found:
        raise DataError("no train_000.jsonl, train_001.jsonl, ...", file=folder, remedy="--input names their folder")
    if missing := max(found) + 1 - len(found):
        first = itertools.islice((number for number in itertools.count() if number not in found), min(missing, 20))
        more = f" and {missing - 20} more; the last is {found[max(found)].name}" if missing > 20 else ""
        raise DataError(
            f"segments are missing: {', '.join(map(str, first))}{more}",
            file=folder,
            remedy="fetch or mix them, then run again",
        )
    yield from sorted(found.items())
