"""How long a run's steps took and what they drew, from a log of any size: all of a short one, places of a long one.

A whole run's log takes seconds to read; `status` answers for ten of them at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from data_tools.files.plain_file import open_plain
from megatron_patch.run.log import DAMAGED, accepted_backwards, is_number, record_of

_READ_WHOLE = 2 << 20
_PLACES, _PLACE_BYTES = 128, 4096
_WINDOW = 16


@dataclass(frozen=True)
class Pace:
    """Steps of the history that counts.

    Attributes:
        started: when the first of them began, seconds since 1970; None where there is none.
        stepping: seconds spent on them.
        is_estimate: from the mean of some 2,000 of them, times their number.
        rates: step and tokens/s of windows of them, the first first: medians of some 16 that were read.
        joules: that their GPUs drew, where that was measured.
        metered: how many of the steps that is, among `steps`.
        tokens_a_step: of one of them.
    """

    started: float | None = None
    stepping: float = 0.0
    is_estimate: bool = False
    rates: tuple[tuple[int, float], ...] = ()
    joules: float = 0.0
    metered: float = 0.0
    steps: int = 0
    tokens_a_step: float = 0.0

    @classmethod
    def of(cls, log: Path, until: float = math.inf) -> Pace:
        """Of steps up to `until`; nothing where there is no log. Raises OSError where it cannot be read."""
        if not log.exists():
            return cls()
        is_estimate = log.stat().st_size > _READ_WHOLE
        found: list[dict[str, Any]] = []  # from the last to the first, those made again left out
        for record in reversed(list(_sampled(log))) if is_estimate else filter(_is_timed, accepted_backwards(log)):
            if record["step"] <= until and (not found or record["step"] < found[-1]["step"]):
                found.append(record)
        if not found:
            return cls(is_estimate=is_estimate)
        last, first = found[0], found[-1]
        steps = last["step"] - first["step"] + 1 if is_estimate else len(found)
        each = steps / len(found)
        drawn = [record["joules"] for record in found if is_number(record.get("joules"))]
        return cls(
            started=first["time"] - first["seconds"],
            stepping=sum(record["seconds"] for record in found) * each,
            is_estimate=is_estimate,
            rates=tuple(_rates(found[::-1])),
            joules=sum(drawn) * each,
            metered=len(drawn) * each,
            steps=steps,
            tokens_a_step=last["tokens"] / last["step"] if is_number(last.get("tokens")) and last["step"] else 0.0,
        )


def _rates(records: list[dict[str, Any]]) -> Iterator[tuple[int, float]]:
    timed = [record for record in records if is_number(record.get("tokens_per_second"))]
    for at in range(0, len(timed), _WINDOW):
        window = timed[at : at + _WINDOW]
        yield window[0]["step"], median(record["tokens_per_second"] for record in window)


def _sampled(log: Path) -> Iterator[dict[str, Any]]:
    """Steps at places that lie evenly in the file, its beginning and end among them."""
    with open_plain(log) as stream:
        end = stream.seek(0, 2) - _PLACE_BYTES
        for i in range(_PLACES):
            place = i * end // (_PLACES - 1)
            stream.seek(place)
            lines = stream.read(_PLACE_BYTES).split(b"\n")
            for line in itertools.islice(lines[:-1], 1 if place else 0, None):
                try:
                    record = record_of(line)
                except DAMAGED:
                    continue
                if _is_timed(record):
                    yield record


def _is_timed(record: dict[str, Any]) -> bool:
    return "seconds" in record and "time" in record
