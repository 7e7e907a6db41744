"""Curves small enough for a page: of many points, those that keep every peak."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_patch.results import axis_unit

MOST_POINTS = 1600
Point = tuple[float, float, float]
"""Time in seconds since 1970, tokens (or what stands for them), value."""


@dataclass
class Thinned:
    """Points that come one after the other, at most `most` (a multiple of 4) kept; of each stretch lowest and highest.

    Stretches grow as points come, so that memory does not: a whole run has 768,000.
    """

    most: int = MOST_POINTS
    last: Point | None = None
    _ends: list[tuple[Point, ...]] = field(default_factory=list)
    _open: list[Point] = field(default_factory=list)
    """Lowest and highest, as far as they differ, of the stretch that grows, in the order in which they came."""
    _low: float = 0.0
    _high: float = 0.0
    _count: int = 0
    _width: int = 1

    def add(self, time: float, tokens: float, value: float) -> None:
        self.last = point = (time, tokens, value)
        if not self._count:
            while len(self._ends) * min(self._width, 2) >= self.most:
                pairs = zip(self._ends[::2], self._ends[1::2], strict=True)
                self._ends = [_extremes([*first, *second]) for first, second in pairs]
                self._width *= 2
            self._open, self._low, self._high = [point], value, value
        elif value < self._low:
            self._open, self._low = [self._highest(), point], value
        elif value > self._high:
            self._open, self._high = [self._lowest(), point], value
        self._count += 1
        if self._count == self._width:
            self._ends.append(tuple(self._open))
            self._open, self._count = [], 0

    def points(self) -> list[Point]:
        """In the order in which they came."""
        return [point for ends in self._ends for point in ends] + self._open

    def _lowest(self) -> Point:
        return next(point for point in self._open if point[2] == self._low)

    def _highest(self) -> Point:
        return next(point for point in self._open if point[2] == self._high)


def _extremes(points: list[Point]) -> tuple[Point, ...]:
    if len(points) == 1:
        return (points[0],)
    low, high = (pick(range(len(points)), key=lambda i: points[i][2]) for pick in (min, max))
    return tuple(points[i] for i in sorted({low, high}))


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


def curve(name: str, thinned: Thinned, axes: Axes, scale: float = 1.0) -> dict[str, Any]:
    """A curve for the page: its points' places on both axes and values, these times `scale`."""
    points = [(axes.at(time, tokens), value * scale) for time, tokens, value in thinned.points()]
    return {
        "name": name,
        "time": [at["time"] for at, _ in points],
        "tokens": [at["tokens"] for at, _ in points],
        "values": [float(f"{value:.6g}") for _, value in points],
    }
