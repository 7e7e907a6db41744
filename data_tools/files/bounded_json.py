"""JSON from files that anything may have happened to: bounded in bytes and in nesting before it is used.

Parsed JSON takes some twenty times its bytes, and what is nested a thousand deep ends the functions that walk it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TypeGuard

from data_tools.files.plain_file import open_plain

MOST_BYTES = 16 << 20
_DEEPEST = 64


def parse_bounded(content: bytes) -> Any:
    """Raises ValueError where it is no JSON, or is nested more than 64 deep."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("nested without end") from None
    if content.count(b"[") + content.count(b"{") > _DEEPEST:
        _check_depth(value)
    return value


def read_bounded(path: Path, most: int = MOST_BYTES) -> bytes:
    """A file's content. Raises ValueError where it has more than `most` bytes, OSError where it is no plain file."""
    with open_plain(path) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most:,} bytes")
    return content


def load_bounded(path: Path, most: int = MOST_BYTES) -> Any:
    """A file's JSON. Raises as `read_bounded` and `parse_bounded` do."""
    return parse_bounded(read_bounded(path, most))


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value read from JSON is a finite number, as a float holds it: Python reads `NaN` and 400 digits too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if any(isinstance(value, list | dict) for value in level):
        raise ValueError(f"nested more than {_DEEPEST} deep")
