"""Units of work of `tokenize`: a source's tasks, packed so that many small files share one part and its record.

A part's record lists the files that it was made from. A later run compares them with what is there by then, file by
file, so that whatever was removed, added, emptied or replaced since is refused by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.files.errors import DataError
from data_tools.files.json_file import fields_named, read_sealed
from data_tools.files.plain_file import file_size
from data_tools.sources.documents import Task

PACK_BYTES = 1 << 24
"""Files are packed up to this size, larger ones stand alone: what a kill costs, and work for many processes."""
PACK_FILES = 1 << 13
NAMED_FILES = 5
REMOVE_AND_AGAIN = "remove it and run again"


class Input(NamedTuple):
    """A task and the size of its whole file, as a record has it."""

    file: str
    start: int
    stop: int | None
    size: int


@dataclass(frozen=True)
class Unit:
    """Tasks whose documents, one after the other, make one part.

    Attributes:
        sizes: bytes of the tasks' whole files.
    """

    tasks: tuple[Task, ...]
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes that are read."""
        return sum(map(_task_bytes, self.tasks, self.sizes))

    def identity(self, options: dict[str, Any]) -> dict[str, Any]:
        """What a record says from the start. One task is written as before there were units."""
        if len(self.tasks) == 1:
            return {"task": asdict(self.tasks[0]), "input_bytes": self.sizes[0], "options": options}
        return {"tasks": [list(entry) for entry in self.inputs], "options": options}

    @property
    def inputs(self) -> list[Input]:
        pairs = zip(self.tasks, self.sizes, strict=True)
        return [Input(task.file, task.start, task.stop, size) for task, size in pairs]


def part_name(number: int) -> str:
    """Name of a unit's files without suffix: `part_00007`."""
    return f"part_{number:05d}"


def _task_bytes(task: Task, size: int) -> int:
    return size if task.stop is None else task.stop - task.start


def file_sizes(folder: Path, tasks: Sequence[Task]) -> dict[str, int]:
    """Bytes of the tasks' files."""
    return {name: file_size(folder / name) for name in dict.fromkeys(task.file for task in tasks)}


def pack(tasks: Sequence[Task], sizes: dict[str, int], most_bytes: int) -> list[Unit]:
    """Units of up to `most_bytes` (or of one task) and PACK_FILES tasks, in the order of the tasks."""
    units: list[Unit] = []
    held: list[Task] = []
    filled = 0
    for task in tasks:
        size = _task_bytes(task, sizes[task.file])
        if held and (filled + size > most_bytes or len(held) == PACK_FILES):
            units.append(_unit(held, sizes))
            held, filled = [], 0
        held.append(task)
        filled += size
    return [*units, _unit(held, sizes)]


def _unit(tasks: Sequence[Task], sizes: dict[str, int]) -> Unit:
    return Unit(tuple(tasks), tuple(sizes[task.file] for task in tasks))


def read_records(target: Path) -> dict[int, dict[str, Any]]:
    """The records of finished parts, by number.

    Raises:
        DataError: one is damaged.
    """
    paths = [path for path in target.glob("part_*.json") if path.stem.removeprefix("part_").isdigit()]
    return {int(path.stem.removeprefix("part_")): read_sealed(path, REMOVE_AND_AGAIN) for path in sorted(paths)}


def fitting_units(
    tasks: Sequence[Task],
    sizes: dict[str, int],
    options: dict[str, Any],
    target: Path,
    records: dict[int, dict[str, Any]],
    parts: int | None,
) -> list[Unit]:
    """The units that the records of an earlier run are of: packed, or a task each, as they were before.

    Args:
        parts: how many the source has; None where no run has finished it.

    Raises:
        DataError: other options, or a file was removed, added, emptied or is of another size.
    """
    for number, record in records.items():
        path = target / f"{part_name(number)}.json"
        with fields_named(path, REMOVE_AND_AGAIN):
            before = record["identity"]["options"]
            recorded_inputs(record)
        if before != options:
            differing = [
                f"{name} {before.get(name)}, now {value}"
                for name, value in options.items()
                if before.get(name) != value
            ]
            raise DataError(
                f"made from other input or with other options: {'; '.join(differing)}",
                file=path,
                remedy=f"use the same command as before, or another --output, or remove {target}",
            )
    packed = pack(tasks, sizes, min(PACK_BYTES, int(options["task_bytes"])))
    single = [_unit([task], sizes) for task in tasks]
    for units in (packed, single):
        if parts in (None, len(units)) and all(
            number < len(units) and record["identity"] == units[number].identity(options)
            for number, record in records.items()
        ):
            return units
    of_units = not records or any("tasks" in record["identity"] for record in records.values())
    raise _changed(target, packed if of_units else single, records, parts, sizes)


def recorded_inputs(record: dict[str, Any]) -> list[Input]:
    """What a part was made from, by its record."""
    identity = record["identity"]
    if "tasks" in identity:
        return [Input(*entry) for entry in identity["tasks"]]
    task = identity["task"]
    return [Input(task["file"], task["start"], task["stop"], identity["input_bytes"])]


def _changed(
    target: Path, units: list[Unit], records: dict[int, dict[str, Any]], parts: int | None, sizes: dict[str, int]
) -> DataError:
    """What became of the files since the records were written."""
    recorded = {number: recorded_inputs(record) for number, record in records.items()}
    before = {entry.file: entry.size for entry in chain.from_iterable(recorded.values())}
    others = [
        unit
        for number, unit in enumerate(units)
        if recorded.get(number, unit.inputs) != unit.inputs or (parts is not None and number >= parts)
    ]
    found = {
        "not there any more": [file for file in before if file not in sizes],
        "of another size": [file for file in before if file in sizes and sizes[file] != before[file]],
        "new": list(dict.fromkeys(task.file for unit in others for task in unit.tasks if task.file not in before)),
    }
    said = [
        f"{', '.join(map(ascii, files[:NAMED_FILES]))}{' and more' if files[NAMED_FILES:] else ''}:"
        f" {what} ({len(files):,})"
        for what, files in found.items()
        if files
    ]
    return DataError(
        "made from other input or with other options: " + ("; ".join(said) or "the files are cut into other parts"),
        file=target,
        remedy=f"bring the files back as they were, or use another --output, or remove {target}",
    )
