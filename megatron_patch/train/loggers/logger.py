"""The one interface of every place that a run's numbers go to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Logger(Protocol):
    """Takes the records of log.jsonl, in order; each has its `step`."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None:
        """No more records in this attempt. Waits for what is still on its way, for a bounded time."""


class Service(Logger, Protocol):
    """A logger that keeps a run elsewhere, across attempts. Made anew where one raised: its errors end nothing."""

    @property
    def step(self) -> int:
        """The last step that it holds of the run; 0 for none. Records up to it are not sent again."""


@dataclass(frozen=True)
class RunOfService:
    """What a service is given of a run."""

    id: str  # the same for every attempt
    name: str
    done: int  # the step that this attempt goes on from
    config: Mapping[str, Any]  # the resolved recipe
    folder: Path  # absolute; for what the library keeps on disk


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What of a record can be drawn over steps; a value that was not finite is null there, and left out here."""
    drawn = {key: value for key, value in record.items() if key not in ("step", "time")}
    return {key: value for key, value in drawn.items() if isinstance(value, int | float)}
