"""Documents of a source: JSONL (plain, gz, zst) and Parquet files, in a fixed order, cut into tasks of bounded size.

The tasks depend on the files alone, never on the number of processes, so whatever is written a task at a time has the
same bytes on any machine.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson
import zstandard

from data_tools.files.digest import digest_stream
from data_tools.files.durable import errors_named
from data_tools.files.errors import DataError
from data_tools.files.plain_file import file_size

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
PARQUET_SUFFIX = ".parquet"
_READ_SUFFIXES = (*JSONL_SUFFIXES, PARQUET_SUFFIX)
_OTHER_FORM = re.compile(
    r".*\.(jsonl|jsonlines|ndjson|parquet)"  # read where the name ends in small letters and in one of the above
    r"|.*\.(json|jsonl|jsonlines|ndjson|parquet)\.(7z|br|bz2|gz|lz4|lzma|snappy|sz|xz|zip|zst|zstd|part|partial|tmp)",
    re.IGNORECASE | re.DOTALL,
)
"""Names of files that hold documents, but packed in a way that is not read, or not whole."""
TEXT_FIELDS = ("text", "content")
TASK_BYTES = 1 << 30
"""Plain JSONL files are cut into tasks of this many bytes; compressed files and Parquet are one task each."""
LONGEST_LINE = 1 << 28
"""Bytes of a line of JSONL; a longer one is no document, and reading it would take the memory of the machine."""
DECOMPRESSION_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)
LEFT_OUT = "github"
"""RedPajama's github subset is tokenised by the authors' scripts but is not in the mix (paper, Table 2)."""


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


def list_files(folder: Path) -> list[Path]:
    """The data files of a source, all levels deep and through links, in the order of their relative paths.

    Raises:
        DataError: there is none, one holds documents in a form that is not read, or a link leads to a folder that is
            there already.
        OSError: a folder cannot be read.
    """
    visible = list(_visible_files(folder))
    files = [path for path in visible if _is_read(path)]
    for path in visible:
        if _OTHER_FORM.fullmatch(path.name) and not _is_read(path):
            raise DataError(
                f"holds documents, it seems, but only {', '.join(_READ_SUFFIXES)} are read",
                file=path,
                remedy="pack it as one of these, or move it out of the source's folder",
            )
    if not files:
        raise DataError(
            f"no {', '.join(_READ_SUFFIXES)} file",
            file=folder,
            remedy="--input names the folder that holds the source's files",
        )
    for path in files:
        if bad_text(str(path)):
            raise DataError("the name is not UTF-8, as a manifest must be", file=path, remedy="rename it")
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def list_left_out(folder: Path) -> list[str]:
    """The names of a source's other files (licences, checksums, lists of addresses), relative to `folder`, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in _visible_files(folder) if not _is_read(path))


def _visible_files(folder: Path) -> Iterator[Path]:
    """All files of a source but hidden ones and those of LEFT_OUT."""
    seen: dict[str, str] = {}
    for here, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        if (same := seen.setdefault(os.path.realpath(here), here)) != here:
            raise DataError(f"is the folder {same} again", file=here, remedy="remove one of them, or the link")
        folders[:] = [name for name in folders if not name.startswith(".") and name != LEFT_OUT]
        yield from (Path(here, name) for name in names if not name.startswith("."))


def _is_read(path: Path) -> bool:
    return path.name.endswith(_READ_SUFFIXES)


def _raise(error: OSError) -> None:
    raise error


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
            yield from _parquet_documents(path)
            return
        try:
            with open_decompressed(path) as stream:
                yield from _jsonl_documents(stream, path, task, digest)
        except DECOMPRESSION_ERRORS as error:
            raise DataError(f"cannot decompress: {error}", file=path, remedy="fetch or copy the file again") from None


def open_decompressed(path: Path) -> BinaryIO:
    """The bytes of a plain, gz or zst file, as one stream."""
    if path.name.endswith((".gz", ".zst")) and not path.stat().st_size:
        raise EOFError("the file is empty")
    if path.name.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.name.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(path), 1 << 20)
    return path.open("rb", buffering=1 << 20)


class _ZstdStream(io.RawIOBase):
    """All frames of a zst file; a file that ends inside a frame is an error, which zstandard's reader lets pass."""

    READ_BYTES = 1 << 12  # four bytes can stand for 128 KiB, so this much for 128 MiB, which are held at once

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._decompressor = zstandard.ZstdDecompressor().decompressobj()
        self._ready = memoryview(b"")
        self._inside_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._file.read(self.READ_BYTES)
            if not block:
                if self._inside_frame:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._feed(block)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _feed(self, block: bytes) -> None:
        pieces = []
        while block:
            self._inside_frame = True
            pieces.append(self._decompressor.decompress(block))
            block = b""
            if self._decompressor.eof:
                block = self._decompressor.unused_data
                self._decompressor = zstandard.ZstdDecompressor().decompressobj()
                self._inside_frame = False
        self._ready = memoryview(b"".join(pieces))

    def close(self) -> None:
        self._file.close()
        super().close()


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


def _parquet_documents(path: Path) -> Iterator[Document]:
    import pyarrow  # 0.2 s and 100 MB that only Parquet sources need
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = next((name for name in TEXT_FIELDS if name in names), None)
            if column is None or names.count(column) > 1:
                which = f"no {' or '.join(TEXT_FIELDS)} column" if column is None else f"more than one column {column}"
                raise DataError(which, file=path, remedy="check the source's files")
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in _values(batch.column(column)):
                    number += 1
                    place = f"row {number}"
                    reason = bad_text(text)
                    yield Document(place, "", repr(text).encode(), reason) if reason else Document(place, str(text))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read: {error}", file=path, remedy="fetch or copy the file again") from None


def _values(column: Any) -> list[object]:
    """The values of a Parquet column; those of a string column that are not UTF-8 as bytes."""
    try:
        return cast(list[object], column.to_pylist())
    except UnicodeDecodeError:
        raw = column.cast("binary").to_pylist()
        return [value if value is None else _decoded(value) for value in raw]


def _decoded(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def rejected_line(file: str, document: Document) -> bytes:
    """A bad document's line in a `.rejected.jsonl`: file, place, reason and the untouched line."""
    try:
        content = {"row": document.raw.decode()}
    except UnicodeDecodeError:
        content = {"row_base64": base64.b64encode(document.raw).decode()}
    record = {"file": file, "place": document.place, "reason": document.reason, **content}
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
