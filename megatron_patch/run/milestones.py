"""RUN/checkpoints/checkpoints.csv: the milestones of a run, a line each. No torch here: reports read it too."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path

TABLE_NAME = "checkpoints.csv"


@dataclass(frozen=True)
class Milestone:
    """A line of the table."""

    name: str
    step: int
    samples: int
    tokens: int
    segments: str  # segments whose rows were trained on since the milestone before, "first-last"
    wall_time: str  # UTC, ISO 8601
    contents: str
    digest: str


_NAMES = [field.name for field in fields(Milestone)]


def read(table: Path) -> tuple[list[dict[str, str]], bool]:
    """The whole lines of a table, and whether it has no others; no lines where there is no table."""
    if not table.is_file():
        return [], True
    found = list(csv.DictReader(io.StringIO(table.read_text(errors="replace"))))
    rows = [row for row in found if list(row) == _NAMES and all(row.values()) and _are_counts(row)]
    return rows, len(rows) == len(found) > 0


def _are_counts(row: dict[str, str]) -> bool:
    return all(row[name].isdecimal() for name in ("step", "samples", "tokens"))


def with_line(rows: list[dict[str, str]], milestone: Milestone) -> bytes:
    """A table of these lines and a milestone's, in place of an earlier one of its name."""
    line = {key: str(value) for key, value in asdict(milestone).items()}
    kept = [row for row in rows if row["name"] != milestone.name]
    text = io.StringIO()
    writer = csv.DictWriter(text, _NAMES, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted([*kept, line], key=lambda row: int(row["step"])))
    return text.getvalue().encode()
