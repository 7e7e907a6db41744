"""Reading RUN/log.jsonl: one JSON object a line, each with its `step` (train/metrics.py writes it)."""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from data_tools.files.plain_file import open_plain

DAMAGED = (ValueError, KeyError, TypeError)  # what `record_of` raises
_NUMBERS = ("time", "seconds", "samples", "tokens", "tokens_per_second", "learning_rate")
_NUMBERS_OR_NULL = ("loss", "grad_norm", "held_out_loss")  # null: not finite


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value read from JSON is a finite number, as a float holds it: Python reads `NaN` and 400 digits too."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of a log; a last line that is still being written is left out."""
    with open_plain(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            yield number, line


def record_of(line: bytes) -> dict[str, Any]:
    """The record of a line. Raises one of DAMAGED where it is none."""
    record: dict[str, Any] = json.loads(line)
    operator.index(record["step"])
    for name in (*_NUMBERS, *_NUMBERS_OR_NULL):
        if name in record and not is_number(value := record[name]) and not (value is None and name in _NUMBERS_OR_NULL):
            raise TypeError(f"{name} is {value!r}, not a number")
    return record


def is_step(record: dict[str, Any]) -> bool:
    """Whether a record is that of a step, with all its numbers; others are held-out losses and remarks."""
    return all(name in record for name in (*_NUMBERS, "loss", "grad_norm"))


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
