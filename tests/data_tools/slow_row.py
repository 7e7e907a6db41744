"""What one line of a JSONL segment is, by Python's own JSON reader: the judge of the C++ core."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _integer(digits: str) -> int:
    if not digits.isdigit():
        raise ValueError("a sign")  # JSON has -0, ids do not
    return int(digits)


def _refuse(text: str) -> Any:
    raise ValueError(text)


def slow_row(line: bytes, row_length: int, vocab_size: int, sources: Sequence[str]) -> tuple[list[int], str] | None:
    """The ids and source of a line (without its newline); None if it is not a sound row."""
    try:
        # ASCII white space and printable characters are all that a sound row holds; Latin-1 decodes any byte.
        value = json.loads(
            line.decode("latin-1"),
            parse_int=_integer,
            parse_float=_refuse,
            parse_constant=_refuse,
            object_pairs_hook=_pairs,
        )
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or set(value) != {"token_ids", "source"}:
        return None
    ids, source = value["token_ids"], value["source"]
    if not isinstance(ids, list) or len(ids) != row_length or not isinstance(source, str) or source not in sources:
        return None
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        return None
    return ids, source
