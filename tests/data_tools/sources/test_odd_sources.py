"""Raw files as a cluster has them: endless lines, bombs, odd Parquet, links, pipes, bad disks, tokenizers."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_tools.files.errors import DataError
from data_tools.pack.tokenize_source import tokenize_source
from data_tools.sources import documents
from data_tools.sources.compressed import open_decompressed
from data_tools.sources.documents import Task, plan_tasks, read_documents
from data_tools.sources.source_files import list_files
from data_tools.sources.text_encoder import TextEncoder
from tests.data_tools.conftest import build_amber

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "x.jsonl": bytes,
    "x.jsonl.gz": gzip.compress,
    "x.jsonl.zst": zstandard.compress,
}


@pytest.mark.parametrize("name", COMPRESS)
def test_an_endless_line_is_refused_where_it_stands(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LONGEST_LINE", 64)
    longest = b'{"text": "' + b"x" * 51 + b'"}'
    (tmp_path / name).write_bytes(COMPRESS[name](longest + b"\n" + longest))
    assert [len(document.text) for document in read_documents(tmp_path, Task(name, 0, None))] == [51, 51]
    (tmp_path / name).write_bytes(COMPRESS[name](longest + b"\n" + longest + b" \n"))
    with pytest.raises(DataError, match=f"{name}: line 2: longer than 64 bytes"):
        list(read_documents(tmp_path, Task(name, 0, None)))


def test_a_task_that_begins_inside_an_endless_line_reads_past_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "LONGEST_LINE", 64)
    (tmp_path / "x.jsonl").write_bytes(b"x" * 1000 + b'\n{"text": "a"}\n')
    first, *others = plan_tasks(tmp_path, 300)
    assert [document.text for task in others for document in read_documents(tmp_path, task)] == ["a"]
    with pytest.raises(DataError, match=r"x\.jsonl: line 1: longer"):
        list(read_documents(tmp_path, first))


def test_a_bomb_is_unpacked_a_bounded_piece_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.compress(bytes(1 << 24)) * 64)  # 1 GiB in 40 kB
    with open_decompressed(path) as stream:
        assert stream.read(1) == b"\0"
        assert len(stream.raw._ready) <= 1 << 27  # type: ignore[attr-defined]
        assert 1 + sum(map(len, iter(lambda: stream.read(1 << 20), b""))) == 1 << 30


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
def test_an_empty_file_is_no_compressed_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=f"{name}: cannot decompress: the file is empty"):
        list(read_documents(tmp_path, Task(name, 0, None)))


def not_utf8() -> pa.Array:
    return pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.array([0, 1, 2, 3], "i4").tobytes()), pa.py_buffer(b"a\xffb")]
    )


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"text": pa.array(["a", "b"], pa.large_string())}, ["a", "b"]),
        ({"text": pa.array(["a", "b", "a"]).dictionary_encode()}, ["a", "b", "a"]),
        ({"text.en": ["x"], "text": ["a"]}, ["a"]),
        ({"meta": [{"text": "x"}], "content": ["a"]}, ["a"]),
        ({"text": ["a", None]}, ["a", "row 2: the text is null"]),
        ({"text": not_utf8()}, ["a", "row 2: the text is bytes, not UTF-8", "b"]),
        ({"text": pa.nulls(1)}, ["row 1: the text is null"]),
        ({"text": pa.array(["a", "b"], pa.string_view())}, ["a", "b"]),
    ],
)
def test_parquet_columns(table: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    found = list(read_documents(tmp_path, Task("x.parquet", 0, None)))
    assert [f"{d.place}: {d.reason}" if d.reason else d.text for d in found] == expected


def test_parquet_with_empty_row_groups_and_with_a_column_twice(tmp_path: Path) -> None:
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(tmp_path / "x.parquet", schema) as writer:
        for texts in ([], ["a"], [], ["b"], []):
            writer.write_table(pa.table({"text": pa.array(texts, pa.string())}, schema))
    assert [d.text for d in read_documents(tmp_path, Task("x.parquet", 0, None))] == ["a", "b"]
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: more than one column text"):
        list(read_documents(tmp_path, Task("x.parquet", 0, None)))


def test_links_are_followed_once(tmp_path: Path) -> None:
    raw, elsewhere = tmp_path / "raw", tmp_path / "elsewhere"
    for folder in (raw, elsewhere):
        folder.mkdir()
        (folder / "x.jsonl").touch()
    (raw / "linked").symlink_to(elsewhere)
    assert list_files(raw) == [raw / "linked" / "x.jsonl", raw / "x.jsonl"]
    (elsewhere / "circle").symlink_to(raw)
    with pytest.raises(DataError, match=r"linked/circle: is the folder .*raw again"):
        list_files(raw)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "a.jsonl.bz2",
            "a.jsonl.xz",
            "a.parquet.gz",
            "a.ndjson",
            "a.JSONL",
            "a.Jsonl.GZ",
            "a.json.xz",
            "a\n.jsonl.lz4",
        ),
        *(
            "b.PARQUET",
            "deep/a.jsonl.1",
            "a.jsonl.gz.lzo",
            "a.jsonl~",
            "a.jsonl_old",
            "a.parquet.copy",
            "a.jsonl.gz (1)",
        ),
    ],
)
def test_documents_in_a_form_that_is_not_read_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").touch()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"holds documents, it seems, but only \.jsonl, ") as error:
        list_files(tmp_path)
    assert error.value.file == str(tmp_path / name)


def test_what_else_lies_beside_the_documents_is_said(small_corpus: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "sub").mkdir(parents=True)
    (raw / "x.jsonl").write_text('{"text": "a"}\n')
    beside = [
        "LICENSE",
        "README.md",
        "_SUCCESS",
        "dataset_infos.json",
        "sub/urls.txt",
        "x.jsonl.gz.md5",
        "x.jsonl.sha256",
    ]
    for name in (*beside, ".hidden.txt"):
        (raw / name).touch()
    (raw / os.fsdecode(b"\xff.txt")).touch()
    arguments = ("tokenize", "--source", "book", "--input", raw, "--output", tmp_path / "out", "--row-length", 2)
    said = build_amber(*arguments, "--tokenizer", small_corpus / "tokenizer.json").stderr
    assert f"book: 8 files are neither JSONL nor Parquet and left out: {', '.join(map(repr, beside))}, " in said


def test_names_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list_files(tmp_path / "none")
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"x\.jsonl: not a plain file"):
        plan_tasks(tmp_path)
    (tmp_path / os.fsdecode(b"\xff.jsonl")).touch()
    with pytest.raises(DataError, match="the name is not UTF-8"):
        list_files(tmp_path)


def test_an_error_of_the_disk_names_the_file_that_is_read(small_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    name = "train_000.jsonl"
    (tmp_path / "raw" / name).symlink_to("/proc/self/mem")  # its first page cannot be read: EIO
    source = ("--source", "c4", "--tokenizer", small_corpus / "tokenizer.json", "--workers", 1)
    for command, more in (("tokenize", source), ("index", ())):
        arguments = ("--input", tmp_path / "raw", "--output", tmp_path / command)
        result = build_amber(command, *arguments, *more, check=False)
        assert result.returncode == 1
        assert result.stderr.startswith(f"error: {tmp_path / 'raw' / name}: Input/output error\n  remedy: ")


@pytest.mark.parametrize("output", [".", "book/rows", "book"])
def test_output_among_the_sources_files_is_refused(output: str, small_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "x.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match="lies in the folder of the source's files"):
        tokenize_source("book", tmp_path / "book", tmp_path / output, small_corpus / "tokenizer.json", row_length=2)
    assert sorted(path.name for path in (tmp_path / "book").iterdir()) == ["x.jsonl"]


def test_a_source_without_a_document_is_refused(small_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.jsonl").touch()
    with pytest.raises(DataError, match="raw: no documents"):
        tokenize_source("book", tmp_path / "raw", tmp_path / "out", small_corpus / "tokenizer.json", row_length=2)
    assert not (tmp_path / "out" / "book" / "source.json").exists()


def with_token(path: Path, target: Path, number: int, *, added: bool) -> Path:
    value = json.loads(path.read_text())
    if added:
        value["added_tokens"].append({**value["added_tokens"][-1], "id": number, "content": "<more>"})
    else:
        value["model"]["vocab"]["<more>"] = number
    target.write_text(json.dumps(value))
    return target


def test_a_tokenizer_whose_ids_have_gaps_is_refused(small_corpus: Path, tmp_path: Path) -> None:
    path = small_corpus / "tokenizer.json"
    size = TextEncoder(path).vocab_size
    for added in (True, False):
        sound = TextEncoder(with_token(path, tmp_path / "next.json", size, added=added))
        sound.check(["a"], tmp_path)
        assert sound.vocab_size == size + 1
    with pytest.raises(DataError, match=f"{size + 1} ids, but the highest is 70000"):
        TextEncoder(with_token(path, tmp_path / "far.json", 70_000, added=False))
    odd = TextEncoder(with_token(path, tmp_path / "far.json", 70_000, added=True))  # Hugging Face numbers it anew
    for use in (lambda: odd.check(["a"], tmp_path), lambda: odd.encode(["<more>"])):
        with pytest.raises(DataError, match=r"far\.json: gigatoken gives the id 70000, but ids are below"):
            use()


def test_one_folder_of_rows_has_one_tokenizer_whatever_its_file_is_called(small_corpus: Path, tmp_path: Path) -> None:
    called = tmp_path / "llama-7b.model"
    called.write_bytes((small_corpus / "tokenizer.model").read_bytes())
    rows, out = tmp_path / "rows", tmp_path / "out"
    tokenize_source("wikipedia", small_corpus / "wikipedia", rows, called, row_length=65)
    build_amber("mix", "--input", rows, "--output", out, "--num-segments", 2, "--direct")
    build_amber("verify", "--input", out)
    other = with_token(small_corpus / "tokenizer.json", tmp_path / "other.json", 1024, added=True)
    with pytest.raises(DataError, match=r"rows/tokenizer\.model: not the tokenizer .*other\.json"):
        tokenize_source("stackexchange", small_corpus / "stackexchange", rows, other, row_length=65)
