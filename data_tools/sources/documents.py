"""Documents of a source, in a fixed order, cut into tasks of bounded size.

The tasks depend on the files alone, never on the number of processes, so whatever is written a task at a time has the
same bytes on any machine.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from data_tools.files.digest import digest_stream
from data_tools.files.durable import errors_named
from data_tools.files.errors import DataError
from data_tools.files.plain_file import file_size
from data_tools.sources.compressed import open_decompressed, unpacking_named
from data_tools.sources.parquet import column_values
from data_tools.sources.source_files import PARQUET_SUFFIX, TEXT_FIELDS, list_files

TASK_BYTES = 1 << 30
"""Plain JSONL files are cut into tasks of this many bytes; compressed files and Parquet are one task each."""
LONGEST_LINE = 1 << 28
"""Bytes of a line of JSONL; a longer one is no document, and reading it would take the memory of the machine."""


@dataclass(frozen=True)
class Task:
    """Lines of `file` that start in bytes [start, stop); `stop` None for a file taken whole."""

    file: str
    start: int
    stop: int | None


@dataclass(frozen=True)
class Document:
    """One document, or the reason why there is none."""

    place: str
    """Line number or Parquet row, counted from 1, and column where known."""
    text: str
    raw: bytes = b""
    reason: str = ""
    """Empty for a good document."""


def plan_tasks(folder: Path, task_bytes: int = TASK_BYTES) -> list[Task]:
    """The tasks of a source, in the order in which their documents follow each other."""
    tasks = []
    for path in list_files(folder):
        name = path.relative_to(folder).as_posix()
        if name.endswith(".jsonl"):
            size = file_size(path)
            tasks += [Task(name, at, min(at + task_bytes, size)) for at in range(0, max(size, 1), task_bytes)]
        else:
            tasks.append(Task(name, 0, None))
    return tasks


def read_documents(folder: Path, task: Task, digest: Any = None) -> Iterator[Document]:
    """The documents of a task, bad ones included, in order.

    Args:
        digest: takes the bytes as they are read: the task's lines, decompressed, or the whole of a Parquet file.

    Raises:
        DataError: the file itself cannot be read (cut short, not what its name says), or a line is endless.
    """
    path = folder / task.file
    with errors_named(path):
        if task.file.endswith(PARQUET_SUFFIX):
            if digest is not None:
                with path.open("rb") as stream:
                    digest_stream(stream, digest)
            for number, value in enumerate(column_values(path, TEXT_FIELDS), 1):
                reason, place = bad_text(value), f"row {number}"
                yield Document(place, "", repr(value).encode(), reason) if reason else Document(place, str(value))
            return
        with unpacking_named(path, "fetch or copy the file again"), open_decompressed(path) as stream:
            yield from _jsonl_documents(stream, path, task, digest)


def _jsonl_documents(stream: BinaryIO, path: Path, task: Task, digest: Any) -> Iterator[Document]:
    at = task.start
    if at:
        at -= 1
        stream.seek(at)
        piece = b""
        while not piece.endswith(b"\n"):  # the line that starts before the task belongs to the one before
            piece = stream.readline(LONGEST_LINE)
            at += len(piece)
            if not piece:
                return
    first = f"byte {at} + line" if task.start else "line"
    number = 0
    while task.stop is None or at < task.stop:
        line = stream.readline(LONGEST_LINE + 1)
        if not line:
            return
        at += len(line)
        number += 1
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"longer than {LONGEST_LINE} bytes",
                file=path,
                place=f"{first} {number}",
                remedy="not a file of one document a line, or a damaged one: mend it or take it away",
            )
        if digest is not None:
            digest.update(line)
        if line.strip(b" \t\r\n"):
            yield parse_line(line, f"{first} {number}")


def parse_line(line: bytes, place: str) -> Document:
    """The document of one JSON line: an object whose `text` or `content` is a string of Unicode characters."""
    raw = line.rstrip(b"\n")
    try:
        value = _read_json(raw)
    except json.JSONDecodeError as error:
        return Document(f"{place} column {error.colno}", "", raw, error.msg)
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5,000 digits, brackets without end
        return Document(place, "", raw, f"not JSON in UTF-8: {error}")
    if not isinstance(value, dict):
        return Document(place, "", raw, "not a JSON object")
    name = next((name for name in TEXT_FIELDS if name in value), None)
    if name is None:
        return Document(place, "", raw, f"no {' or '.join(TEXT_FIELDS)} field")
    text = value[name]
    reason = bad_text(text)
    return Document(place, "", raw, reason) if reason else Document(place, str(text), raw)


def _read_json(raw: bytes) -> object:
    """What Python's own reader makes of `raw`; orjson, which refuses some of that, reads all but the odd line."""
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return json.loads(raw)


def bad_text(text: object) -> str:
    """Why `text` cannot be a document; empty if it can."""
    if text is None:
        return "the text is null"
    if not isinstance(text, str):
        return "the text is not a string" if not isinstance(text, bytes) else "the text is bytes, not UTF-8"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"character {error.start} of the text is half of a surrogate pair"
    return ""


def rejected_line(file: str, document: Document) -> bytes:
    """A bad document's line in a `.rejected.jsonl`: file, place, reason and the untouched line."""
    try:
        content = {"row": document.raw.decode()}
    except UnicodeDecodeError:
        content = {"row_base64": base64.b64encode(document.raw).decode()}
    record = {"file": file, "place": document.place, "reason": document.reason, **content}
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
