"""Reading RUN/log.jsonl: one JSON object a line, each with its `step` (train/metrics.py writes it)."""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DAMAGED = (ValueError, KeyError, TypeError)  # what `record_of` raises


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of a log; a last line that is still being written is left out."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            yield number, line


def record_of(line: bytes) -> dict[str, Any]:
    """The record of a line. Raises one of DAMAGED where it is none."""
    record: dict[str, Any] = json.loads(line)
    operator.index(record["step"])
    return record


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Records in the order of the log, none where there is no file.

    A line that a full or failing disk damaged is left out, and said on standard error: the others still tell.
    """
    if not path.exists():
        return
    for number, line in whole_lines(path):
        place = f"{path}, line {number}"
        try:
            record = record_of(line)
        except DAMAGED:
            print(f"{place}: damaged, no record of a step; left out", file=sys.stderr)
        else:
            yield record
