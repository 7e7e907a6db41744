"""RUN/checkpoints/checkpoints.csv: the milestones of a run, a line each. No torch here: reports read it too."""

from __future__ import annotations

import csv
import io
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from data_tools.files.bounded_json import read_bounded

TABLE_NAME = "checkpoints.csv"
_LONGEST = 1000  # characters of a line: five times what one has
_COUNT = re.compile(r"[0-9]{1,18}")  # below 2**63


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
    """The whole lines of a table, and whether it has no others; no lines where there is no table.

    Whatever else stands there (a folder, a pipe, bytes of another file, no text at all) has no whole lines. Of lines of
    one name that differ none is taken: the milestone itself says what it is.
    """
    if not os.path.lexists(table):
        return [], True
    try:
        header, *lines = read_bounded(table).decode(errors="replace").removeprefix("\ufeff").splitlines()
    except (OSError, ValueError):  # unreadable, too large, or empty
        return [], False
    found = [row for line in lines if (row := _row(line)) is not None] if header == ",".join(_NAMES) else []
    by_name: dict[str, list[dict[str, str]]] = {}
    for row in found:
        by_name.setdefault(row["name"], []).append(row)
    rows = [same[0] for same in by_name.values() if all(row == same[0] for row in same)]
    return rows, len(rows) == len(lines) > 0


def _row(line: str) -> dict[str, str] | None:
    """A line's fields; None where it is no milestone's."""
    if len(line) > _LONGEST:
        return None
    values = next(csv.reader([line]), [])
    row = dict(zip(_NAMES, values, strict=False))
    whole = len(values) == len(_NAMES) and all(values)
    return row if whole and all(_COUNT.fullmatch(row[name]) for name in ("step", "samples", "tokens")) else None


def with_line(rows: list[dict[str, str]], milestone: Milestone) -> bytes:
    """A table of these lines and a milestone's, in place of an earlier one of its name."""
    line = {key: str(value) for key, value in asdict(milestone).items()}
    return as_table([*(row for row in rows if row["name"] != milestone.name), line])


def as_table(rows: list[dict[str, str]]) -> bytes:
    """The file of these lines, by step."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _NAMES, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda row: int(row["step"])))
    return text.getvalue().encode()
