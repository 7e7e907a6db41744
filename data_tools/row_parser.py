"""Strict reader of Amber's JSONL rows: the slow form, in Python."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np

from data_tools.format import SOURCES


class Parsed(NamedTuple):
    """What `parse_rows` made of a block."""

    rows: int
    """Rows written to the arrays."""
    consumed: int
    """Bytes used: up to the end of the block's last line, or to the start of the first bad line."""
    lines: int
    """Lines used, empty ones included."""
    column: int
    """Column of the fault in the bad line, counted from 1; 0 where the block is good."""
    reason: str


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def parse_rows(block: memoryview, ids: np.ndarray, codes: np.ndarray, vocab_size: int) -> Parsed:
    """Reads lines `{"token_ids": [...], "source": "..."}` until the block ends, the arrays are full or a line is bad.

    Args:
        block: bytes of whole lines.
        ids: uint16 [n, row_length], filled from the front.
        codes: uint8 [n] positions in `SOURCES`.
        vocab_size: ids must be below it.
    """
    rows = consumed = lines = 0
    for line in bytes(block).splitlines(keepends=True):
        if line.strip(b" \t\r\n"):
            if rows == len(ids):
                break
            if reason := _fault(line, ids[rows], codes, rows, vocab_size):
                return Parsed(rows, consumed, lines, 1, reason)
            rows += 1
        consumed += len(line)
        lines += 1
    return Parsed(rows, consumed, lines, 0, "")


def _fault(line: bytes, ids: np.ndarray, codes: np.ndarray, row: int, vocab_size: int) -> str:
    try:
        value = json.loads(line, parse_constant=_no_constant, object_pairs_hook=_pairs)
    except ValueError as error:
        return str(error)
    if not isinstance(value, dict) or set(value) != {"token_ids", "source"}:
        return "not an object with the keys token_ids and source"
    tokens, source = value["token_ids"], value["source"]
    if source not in SOURCES:
        return f"unknown source {source!r}"
    if not isinstance(tokens, list) or len(tokens) != len(ids):
        return f"{len(tokens) if isinstance(tokens, list) else 'no'} ids, expected {len(ids)}"
    if not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
        return f"an id is not an integer below {vocab_size}"
    ids[:] = tokens
    codes[row] = SOURCES.index(source)
    return ""
