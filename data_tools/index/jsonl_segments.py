"""Amber's JSONL segments: their names, their lines, and what `mix` says of a folder of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.dataset.format import MAX_VOCAB_SIZE
from data_tools.files.errors import DataError
from data_tools.index._core import RowParser

MIX_MANIFEST = "mix.json"
JSONL_NAME = re.compile(r"train_(\d+)\.jsonl(\.gz|\.zst)?")
_ANY_NAME = re.compile(r"train_(\d+)\..*")  # train_007.jsonl.partial, train_007.json: there is a segment 7, not here


def jsonl_name(segment: int) -> str:
    """Name of a segment's JSONL: `train_007.jsonl`."""
    return f"train_{segment:03d}.jsonl"


def jsonl_lines(rows: np.ndarray, codes: np.ndarray, sources: tuple[str, ...]) -> bytes:
    """Amber's JSONL for uint16 [n, row_length] rows and uint8 [n] source codes, positions in `sources`."""
    writer = RowParser(rows.shape[1], MAX_VOCAB_SIZE, list(sources))
    return writer.format(np.ascontiguousarray(rows), np.ascontiguousarray(codes))


def list_segments(folder: Path, only: range | None = None, count: int = 0) -> Iterator[tuple[int, Path]]:
    """The JSONL segments of a folder by number: `train_0`, `train_000`, plain, gz and zst.

    Args:
        only: these segments; whether others are there does not matter.
        count: how many there are at least, where that is known.

    Raises:
        DataError: there is none, a number is twice there, or one is missing.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := _ANY_NAME.fullmatch(path.name):
            number = int(match[1])
            count = max(count, number + 1)
            if not JSONL_NAME.fullmatch(path.name) or (only is not None and number not in only):
                continue
            if number in found:
                raise DataError(f"is segment {number}, and so is {found[number].name}", file=path, remedy="remove one")
            found[number] = path
    wanted = range(count) if only is None else only
    if only is None and not found:
        raise DataError("no train_000.jsonl, train_001.jsonl, ...", file=folder, remedy="--input names their folder")
    if missing := wanted.stop - wanted.start - len(found):
        first = itertools.islice((number for number in wanted if number not in found), min(missing, 20))
        more = f" and {missing - 20} more; the last is {wanted[-1]}" if missing > 20 else ""
        raise DataError(
            f"segments are missing: {', '.join(map(str, first))}{more}",
            file=folder,
            remedy="fetch or mix them, then run again",
        )
    yield from sorted(found.items())
