"""Parquet in memory bounded in bytes whatever its rows, and damage found, for every kind of column that is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.files.errors import DataError
from data_tools.sources import parquet
from data_tools.sources.documents import Task, read_documents
from data_tools.sources.parquet import column_records, column_values

KINDS: dict[str, tuple[Callable[[list[str]], Any], dict[str, Any]]] = {
    "string": (pa.array, {}),
    "large string": (lambda texts: pa.array(texts, pa.large_string()), {}),
    "string view": (lambda texts: pa.array(texts, pa.string_view()), {}),
    "dictionary": (lambda texts: pa.array(texts).dictionary_encode(), {}),
    "plain pages": (pa.array, {"use_dictionary": False}),
    "delta": (pa.array, {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}),
    "delta length": (pa.array, {"use_dictionary": False, "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"}}),
    "pages of version 2": (pa.array, {"data_page_version": "2.0"}),
    "unpacked": (pa.array, {"compression": "none"}),
    "gzip": (pa.array, {"compression": "gzip"}),
    "statistics in headers": (pa.array, {"write_page_index": False, "write_statistics": True}),
}


def write(path: Path, kind: str, texts: list[str], **more: Any) -> list[str]:
    column, options = KINDS[kind]
    # The other column stands before, with as many pages, so that places are looked up and not guessed.
    table = pa.table({"meta": [{"text": text[:9]} for text in texts], "text": column(texts)})
    pq.write_table(table, path, **{"write_page_checksum": True, "compression": "zstd", **options, **more})
    return texts


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    texts = write(path, kind, [f"{i} words of document {i * i}" for i in range(3000)], row_group_size=1500)
    assert list(column_values(path, ["text"])) == texts
    chunk = pq.read_metadata(path).row_group(1).column(1)
    assert chunk.path_in_schema == "text"
    sound = path.read_bytes()
    starts = {chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset}
    for start in starts:
        with path.open("rb") as stream:
            _, packed, header = parquet._page_header(stream.fileno(), start, path)
        at = start + header + packed // 2
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        with pytest.raises(DataError, match=r"x\.parquet: "):
            list(column_values(path, ["text"]))


def test_a_page_that_takes_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "LARGEST_PAGE", 1 << 16)
    path = tmp_path / "x.parquet"
    for kind in KINDS:
        write(path, kind, [f"{i} " + "x" * 500 for i in range(1000)], row_group_size=900)
        with pytest.raises(
            DataError, match=r"row group 1, column text: has a page of [45]\d\d,\d\d\d bytes.*"
        ) as error:
            list(column_values(path, ["text"]))
        assert "row_group_size" in error.value.remedy
        kind = "string" if kind == "dictionary" else kind  # Arrow writes all of a dictionary into each row group
        texts = write(path, kind, [f"{i} " + "x" * 500 for i in range(1000)], row_group_size=100)
        assert list(column_values(path, ["text"])) == texts  # as the remedy says


@pytest.mark.parametrize("column", [[1, 2], [{"a": "b"}], [["a"]], [b"a"], [1.5], [True]])
def test_a_column_of_other_things_is_refused_as_a_whole(column: list[Any], tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: column text holds .*, not string"):
        list(read_documents(tmp_path, Task("x.parquet", 0, None)))


def test_headers_that_cannot_be_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write(path, "string", ["a", "b"])
    sound = path.read_bytes()
    at = pq.read_metadata(path).row_group(0).column(1).dictionary_page_offset
    for header in (b"\x15" * 60, b"\x1c" * 60, b"\xff" * 60, b"\x19\xfc" + b"\xff" * 58, b"\0" * 60):
        path.write_bytes(sound[:at] + header + sound[at + 60 :])
        with pytest.raises(DataError, match=rf"x\.parquet: byte {at}: damaged header of a page|cannot read"):
            list(column_values(path, ["text"]))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_bounded_by_bytes_not_rows(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 documents of 100 kB in one row group: in batches of 1,024 rows they are 50 MB and more."""
    monkeypatch.setattr(parquet, "BATCH_BYTES", 1 << 20)
    path = tmp_path / "x.parquet"
    text = "".join(chr(97 + i * i % 23) for i in range(1000)) * 100
    write(path, kind, [text] * 500, write_batch_size=5, data_page_size=1 << 17)
    before, most = pa.total_allocated_bytes(), 0
    for number, found in enumerate(column_values(path, ["text"])):  # noqa: B007
        most = max(most, pa.total_allocated_bytes() - before)
        assert found == text
    assert number == 499
    assert most < 6 << 20


def conversations(texts: list[str]) -> pa.Table:
    """As chat data is written: a list of messages, beside what nobody reads."""
    messages = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in texts]
    return pa.table({"id": texts, "messages": messages, "input": [text[:9] for text in texts]})


def test_records_are_read_in_few_bytes_and_what_is_not_asked_for_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "BATCH_BYTES", 1 << 20)
    path = tmp_path / "x.parquet"
    table = conversations([f"{i} " + "abcdefgh" * 6_000 for i in range(120)])
    pq.write_table(table, path, write_batch_size=5, data_page_size=1 << 17, write_page_checksum=True)
    before, most = pa.total_allocated_bytes(), 0
    for number, record in enumerate(column_records(path, ["messages", "input"])):
        most = max(most, pa.total_allocated_bytes() - before)
        assert record == {key: table[key][number].as_py() for key in ("messages", "input")}
    assert number == 119
    assert most < 8 << 20  # all of it: 12 MB
    (chunk,) = (
        chunk
        for chunk in (pq.read_metadata(path).row_group(0).column(i) for i in range(4))
        if chunk.path_in_schema.endswith("content")
    )
    sound, at = path.read_bytes(), chunk.data_page_offset + chunk.total_compressed_size // 2
    path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
    with pytest.raises(DataError, match=r"x\.parquet: cannot read: .*CRC"):
        list(column_records(path, ["messages"]))
    assert len(list(column_records(path, ["input"]))) == 120


def test_records_that_take_too_much_or_are_not_there_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(conversations(["a" * 3000, "b" * 3000]), path, use_dictionary=False)
    with pytest.raises(DataError, match=r"x\.parquet: no conversations or instruction column"):
        list(column_records(path, ["conversations", "instruction"]))
    monkeypatch.setattr(parquet, "LARGEST_PAGE", 12_050)  # the contents have 12,016 and their levels
    with pytest.raises(DataError, match=r"the largest pages of messages, input have \d+,\d+ bytes together"):
        list(column_records(path, ["messages", "input"]))
    monkeypatch.undo()
    monkeypatch.setattr(parquet, "LARGEST_ROWS", 4000)
    with pytest.raises(DataError, match=r"rows 1 to 2: 1\d,\d\d\d bytes, which are read at once; up to 4,000"):
        list(column_records(path, ["messages"]))


def test_a_record_that_is_not_utf_8_is_one_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(conversations(["one", "two", "six"]), path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"two", b"t\xffo"))
    rows = list(column_records(path, ["messages"]))
    assert rows[1] is None
    assert [row["messages"][0]["content"] for row in rows if row] == ["one", "six"]
