"""How long the steps of a run took, from a log of any size: all of a short one, places of a long one.

A whole run's log takes seconds to read; `status` answers for ten of them at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.files.plain_file import open_plain
from megatron_patch.run.log import DAMAGED, accepted_backwards, record_of

_READ_WHOLE = 2 << 20
_PLACES, _PLACE_BYTES = 128, 4096


@dataclass(frozen=True)
class Pace:
    """Steps of the history that counts.

    Attributes:
        started: when the first of them began, seconds since 1970; None where there is none.
        stepping: seconds spent on them.
        is_estimate: from the mean of some 2,000 of them, times their number.
    """

    started: float | None
    stepping: float
    is_estimate: bool

    @classmethod
    def of(cls, log: Path) -> Pace:
        """Nothing where there is no log. Raises OSError where it cannot be read."""
        if not log.exists():
            return cls(None, 0.0, is_estimate=False)
        if log.stat().st_size <= _READ_WHOLE:
            steps = [(r["time"] - r["seconds"], r["seconds"]) for r in accepted_backwards(log) if _is_timed(r)]
            started = steps[-1][0] if steps else None
            return cls(started, sum(seconds for _, seconds in steps), is_estimate=False)
        found: list[dict[str, Any]] = []  # from the last to the first, those made again left out
        for record in reversed(list(_sampled(log))):
            if not found or record["step"] < found[-1]["step"]:
                found.append(record)
        if not found:
            return cls(None, 0.0, is_estimate=True)
        last, *_, first = found * 2
        mean = sum(record["seconds"] for record in found) / len(found)
        return cls(first["time"] - first["seconds"], mean * (last["step"] - first["step"] + 1), is_estimate=True)


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
