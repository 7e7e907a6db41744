"""Reading RUN/log.jsonl: one JSON object a line, each with its `step` (train/metrics.py writes it).

The log of a whole run has 768,000 lines, 208 MB: readers take a line at a time and keep none.
"""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from data_tools.files.bounded_json import is_number, parse_bounded
from data_tools.files.plain_file import open_plain

DAMAGED = (ValueError, KeyError, TypeError)  # what `record_of` raises
MOST_LINE_BYTES = 1 << 20
_NUMBERS = ("time", "seconds", "samples", "tokens", "tokens_per_second", "learning_rate")
_NUMBERS_OR_NULL = ("loss", "grad_norm", "held_out_loss")  # null: not finite
_OF_A_STEP = {*_NUMBERS, "loss", "grad_norm"}
_of_numbers = operator.itemgetter(*_NUMBERS)
_PLAIN = frozenset((int, float, type(None)))
_BLOCK_BYTES = 1 << 20


def whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of a log; a last line that is still being written is left out.

    Of a line of more than a MiB, which no training writes, the beginning, which is no record.
    """
    with open_plain(path) as stream:
        number = 0
        while line := stream.readline(MOST_LINE_BYTES):
            number += 1
            rest = line
            while not rest.endswith(b"\n"):
                if not (rest := stream.readline(MOST_LINE_BYTES)):
                    return
            yield number, line


def record_of(line: bytes) -> dict[str, Any]:
    """The record of a line. Raises one of DAMAGED where it is none."""
    record: dict[str, Any]
    is_finite = False
    if line.count(b"{") + line.count(b"[") > 8:
        record = parse_bounded(line)
    else:
        try:
            record, is_finite = orjson.loads(line), True  # which reads no number that is not
        except orjson.JSONDecodeError:
            record = json.loads(line)  # reads NaN, so that the number is named and not the line
    operator.index(record["step"])
    if not (is_finite and _is_plain(record)):
        _check_numbers(record)
    return record


def _is_plain(record: dict[str, Any]) -> bool:
    """Whether nothing but numbers and null is in it, and no null where a number must be: said at once of a step."""
    try:
        return _PLAIN.issuperset(map(type, record.values())) and None not in _of_numbers(record)
    except KeyError:
        return False


def _check_numbers(record: dict[str, Any]) -> None:
    for name in _NUMBERS:
        if not is_number(record.get(name, 0.0)):
            raise TypeError(f"{name} is not a number")
    for name in _NUMBERS_OR_NULL:
        if (value := record.get(name)) is not None and not is_number(value):
            raise TypeError(f"{name} is not a number")


def is_step(record: dict[str, Any]) -> bool:
    """Whether a record is that of a step, with all its numbers; others are held-out losses and remarks."""
    return record.keys() >= _OF_A_STEP


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Records in the order of the log, none where there is no file.

    A line that a full or failing disk damaged is left out, and reported on standard error: the others still tell.
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


def accepted_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """Records of the history that counts, newest first: of steps made again after a resume the last ones.

    A record counts where no step before it, in the direction of reading, has its number or a lower one. Damaged lines
    are left out. Raises OSError where there is no log.
    """
    lowest = sys.maxsize
    with open_plain(path) as stream:
        for _, line in lines_backwards(stream):
            try:
                record = record_of(line)
            except DAMAGED:
                continue
            if record["step"] < lowest:
                yield record
                if "seconds" in record:
                    lowest = record["step"]


def lines_backwards(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(where it ends, line), the last whole one first; of one of more than a MiB nothing that is a record."""
    place = end = stream.seek(0, 2)
    rest, is_whole = b"", False  # what a last line lacks is its newline
    while place:
        place -= (size := min(_BLOCK_BYTES, place))
        stream.seek(place)
        block, upto = stream.read(size), size
        while (newline := block.rfind(b"\n", 0, upto)) >= 0:
            if is_whole:
                yield end, block[newline + 1 : upto] + rest
            end, upto, rest, is_whole = place + newline + 1, newline, b"", True
        rest = (block[:upto] + rest)[-MOST_LINE_BYTES:]
    if is_whole:
        yield end, rest
