"""Curves small enough for a page: of many points, those that keep every peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_patch.results import axis_unit

MOST_POINTS = 1600


def thin(records: Sequence[dict[str, Any]], key: str, most: int = MOST_POINTS) -> list[dict[str, Any]]:
    """At most `most` records in order; of each stretch the lowest and the highest value of `key` stay.

    Records without the value are left out.
    """
    known = [r for r in records if r.get(key) is not None]
    if len(known) <= most:
        return known
    kept = []
    stretches = most // 2
    for i in range(stretches):
        stretch = known[i * len(known) // stretches : (i + 1) * len(known) // stretches]
        ends = {id(r): r for r in (min(stretch, key=lambda r: r[key]), max(stretch, key=lambda r: r[key]))}
        kept += sorted(ends.values(), key=lambda r: r["time"])
    return kept


@dataclass(frozen=True)
class Axes:
    """The two axes that curves can be drawn along, in units that suit the length of the run."""

    start: float
    time_unit: str
    seconds: float
    token_unit: str
    tokens: float

    @classmethod
    def of(cls, start: float, seconds: float, tokens: float) -> Axes:
        time_unit, per_time = ("hours", 3600.0) if seconds >= 7200 else ("minutes", 60.0)
        token_unit, per_token = axis_unit(tokens)
        return cls(start, time_unit, per_time, f"{token_unit} tokens", per_token)

    def at(self, time: float, tokens: float) -> dict[str, float]:
        return {"time": round((time - self.start) / self.seconds, 5), "tokens": round(tokens / self.tokens, 5)}


def curve(name: str, records: Sequence[dict[str, Any]], key: str, axes: Axes) -> dict[str, Any]:
    """A curve for the page: its points' places on both axes and values. Records hold `time`, `tokens` and `key`."""
    points = [(axes.at(r["time"], r["tokens"]), r[key]) for r in thin(records, key)]
    return {
        "name": name,
        "time": [at["time"] for at, _ in points],
        "tokens": [at["tokens"] for at, _ in points],
        "values": [float(f"{value:.6g}") for _, value in points],
    }
