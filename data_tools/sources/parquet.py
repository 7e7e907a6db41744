"""Columns of a Parquet file, in memory bounded in bytes, with the checksums of its pages compared where it has them.

A page is the least that can be unpacked, and a writer may put a whole row group into one (pyarrow's looks at the size
only every 1,024 rows). So the headers of the pages are read first: the largest page says how many rows are asked for at
once, and one that would take too much is refused. Arrow's own schema, which a file may carry beside Parquet's, is not
followed: it would have a column of dictionaries, or of views, hold all values of a row group.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from data_tools.files.errors import DataError
from data_tools.files.plain_file import open_plain

LARGEST_PAGE = 3 << 26
"""Bytes of a page, unpacked. Reading one takes up to three times as much: packed, unpacked, and as a dictionary."""
BATCH_BYTES = 1 << 26
LARGEST_BATCH = 1024
LARGEST_ROWS = 1 << 28
LARGEST_FOOTER = 1 << 27
_MAGIC = b"PAR1"
_HEADER_BYTES = 1 << 12
_LARGEST_HEADER = 1 << 24
_DAMAGED = "fetch or copy the file again"
_FEWER_ROWS = (
    "write the file again as JSONL, or with fewer rows a group (pyarrow.parquet.write_table(..., row_group_size=64))"
)


def column_values(path: Path, names: Sequence[str]) -> Iterator[object]:
    """The values of the first column of `names` that there is: strings, None, or bytes where one is not UTF-8.

    Raises:
        DataError: no Parquet, damaged, none of the columns or one twice, a column of other things than text, or a page
            of more than LARGEST_PAGE bytes.
    """
    import pyarrow

    with _opened(path) as file:
        found = [name for name in names if name in file.schema_arrow.names][:1]
        _refuse_unless_once(path, file, found, names)
        (column,) = found
        kind = file.schema_arrow.field(column).type
        if kind not in (pyarrow.string(), pyarrow.null()):
            raise DataError(
                f"column {column} holds {kind}, not string",
                file=path,
                remedy=f"write the file again with {column} as a string",
            )
        for batch in _batches(path, file, [column]):
            yield from _values(batch.column(0))


def column_records(path: Path, names: Sequence[str]) -> Iterator[dict[str, Any] | None]:
    """The rows of those columns of `names` that there are, whatever they hold; None for a row that is not UTF-8.

    Raises:
        DataError: no Parquet, damaged, none of the columns or one twice, a page of more than LARGEST_PAGE bytes, or
            a row of more than LARGEST_ROW.
    """
    with _opened(path) as file:
        columns = [name for name in names if name in file.schema_arrow.names]
        _refuse_unless_once(path, file, columns, names)
        row = 0
        for batch in _batches(path, file, columns):
            first, row = row + 1, row + batch.num_rows
            if batch.nbytes > LARGEST_ROWS:  # a row of many messages may lie in many pages
                raise DataError(
                    f"{batch.nbytes:,} bytes, which are read at once; up to {LARGEST_ROWS:,} are",
                    file=path,
                    place=f"row {first}" if first == row else f"rows {first} to {row}",
                    remedy="take such rows away, or write the file again as JSONL",
                )
            try:
                yield from batch.to_pylist()
            except UnicodeDecodeError:
                yield from (_record(batch.slice(i, 1)) for i in range(batch.num_rows))


def _record(batch: Any) -> dict[str, Any] | None:
    try:
        return cast(dict[str, Any], batch.to_pylist()[0])
    except UnicodeDecodeError:
        return None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile` that compares checksums; what goes wrong while it is read names the file."""
    import pyarrow  # 0.2 s and 100 MB that only Parquet sources need
    import pyarrow.parquet

    try:
        options = {"metadata": _metadata(path), "buffer_size": 1 << 20, "page_checksum_verification": True}
        with pyarrow.parquet.ParquetFile(path, **options) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read: {error}", file=path, remedy=_DAMAGED) from None


def _refuse_unless_once(path: Path, file: Any, columns: Sequence[str], names: Sequence[str]) -> None:
    twice = next((name for name in columns if file.schema_arrow.names.count(name) > 1), None)
    if twice or not columns:
        which = f"more than one column {twice}" if twice else f"no {' or '.join(names)} column"
        raise DataError(which, file=path, remedy="check the source's files")


def _batches(path: Path, file: Any, columns: Sequence[str]) -> Iterator[Any]:
    """Record batches of `columns`, as many rows at once as BATCH_BYTES take if each were as large as a page."""
    pages = [_largest_page(path, file.metadata, column) for column in _leaves(file.metadata, columns)]
    if (largest := sum(pages)) > LARGEST_PAGE:
        raise DataError(
            f"the largest pages of {', '.join(columns)} have {largest:,} bytes together; up to {LARGEST_PAGE:,}"
            " are read",
            file=path,
            remedy=_FEWER_ROWS,
        )
    rows = max(1, min(LARGEST_BATCH, BATCH_BYTES // max(1, largest)))
    yield from file.iter_batches(batch_size=rows, columns=list(columns), use_threads=False)


def _leaves(metadata: Any, columns: Sequence[str]) -> list[str]:
    """The columns that are stored: of a list of messages, each field of these (`messages.list.element.content`)."""
    paths = (metadata.schema.column(i).path for i in range(metadata.num_columns))
    return [path for path in paths if path.partition(".")[0] in columns]


def _metadata(path: Path) -> Any:
    """What the footer says, but for Arrow's schema."""
    import pyarrow.parquet

    with open_plain(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        stream.seek(max(0, size - 8))
        end = stream.read(8)
        if size < 12 or end[4:] != _MAGIC:
            encrypted = end[4:] == b"PARE"
            raise DataError(
                "is encrypted Parquet" if encrypted else "cannot read: it is no Parquet file, or is cut short",
                file=path,
                remedy="write it again in the clear" if encrypted else _DAMAGED,
            )
        (length,) = struct.unpack("<I", end[:4])
        if length > min(size - 12, LARGEST_FOOTER):
            raise DataError(f"says that its footer has {length:,} bytes", file=path, remedy=_DAMAGED)
        stream.seek(size - 8 - length)
        footer = stream.read(length).replace(b"ARROW:schema", b"arrow_schema")
    return pyarrow.parquet.read_metadata(io.BytesIO(_MAGIC + footer + end))


def _values(column: Any) -> list[object]:
    """The values of a column; those that are not UTF-8 as bytes."""
    try:
        return cast(list[object], column.to_pylist())
    except UnicodeDecodeError:
        return [value if value is None else _decoded(value) for value in column.cast("binary").to_pylist()]


def _decoded(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _largest_page(path: Path, metadata: Any, column: str) -> int:
    """Bytes of a column's largest page, unpacked, by the headers of all its pages.

    Raises:
        DataError: it is too large, or the headers are damaged.
    """
    largest = 0
    with open_plain(path) as stream:
        for group in range(metadata.num_row_groups):
            chunks = (metadata.row_group(group).column(i) for i in range(metadata.num_columns))
            chunk = next(chunk for chunk in chunks if chunk.path_in_schema == column)
            starts = [at for at in (chunk.dictionary_page_offset, chunk.data_page_offset) if at]
            at = min(starts, default=0)
            stop = at + chunk.total_compressed_size
            while at < stop:
                unpacked, packed, header = _page_header(stream.fileno(), at, path)
                if unpacked > LARGEST_PAGE:
                    raise DataError(
                        f"has a page of {unpacked:,} bytes, which is read at once or not at all; up to"
                        f" {LARGEST_PAGE:,} are read",
                        file=path,
                        place=f"row group {group + 1}, column {column}",
                        remedy=f"{_FEWER_ROWS}, {column} as a string",
                    )
                largest = max(largest, unpacked)
                at += header + packed
    return largest


def _page_header(descriptor: int, at: int, path: Path) -> tuple[int, int, int]:
    """Bytes of the page at `at`, unpacked and packed, and of its header (parquet.thrift: PageHeader)."""
    size = _HEADER_BYTES
    while size <= _LARGEST_HEADER:
        reader = _Thrift(os.pread(descriptor, size, at))
        try:
            fields = reader.struct()
            unpacked, packed = fields[2], fields[3]
        except IndexError:  # longer than what was read: it may hold statistics
            size *= 16
            continue
        except (KeyError, ValueError, RecursionError):
            break
        if isinstance(unpacked, int) and isinstance(packed, int) and unpacked >= 0 and packed >= 0:
            return unpacked, packed, reader.at
        break
    raise DataError("damaged header of a page", file=path, place=f"byte {at}", remedy=_DAMAGED)


class _Thrift:
    """As much of Thrift's compact protocol as tells the whole numbers of a struct and where it ends."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self) -> dict[int, int | None]:
        """The fields by number; None for what is no whole number."""
        fields: dict[int, int | None] = {}
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            fields[number] = self._value(head & 15)
        return fields

    def _value(self, kind: int) -> int | None:
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind in (3, 7, 8):  # a byte, a double, bytes
            self._skip({3: 1, 7: 8}.get(kind) or self._varint())
        elif kind in (9, 10):  # a list, a set
            head = self._byte()
            for _ in range(head >> 4 if head >> 4 < 15 else self._varint()):
                self._element(head & 15)
        elif kind == 11:  # a map
            if count := self._varint():
                kinds = self._byte()
                for _ in range(count):
                    self._element(kinds >> 4)
                    self._element(kinds & 15)
        elif kind == 12:
            self.struct()
        elif kind not in (1, 2):  # true and false are in the kind itself
            raise ValueError(f"no kind {kind}")
        return None

    def _element(self, kind: int) -> None:
        """A value of a list or map, where true and false take a byte."""
        if kind in (1, 2):
            self._byte()
        else:
            self._value(kind)

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise IndexError

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
