"""What of a folder is a source's text: no text twice, nothing that is not whole, nothing passed over in silence."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_tools.files.errors import DataError
from data_tools.sources.documents import Task, read_documents
from data_tools.sources.source_files import list_copies, list_files, list_left_out, refuse_shared
from tests.data_tools.conftest import build_amber

TEXT = b'{"text": "one"}\n{"text": "two"}\n'


def put(folder: Path, *names: str, content: bytes = TEXT) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "pair",
    [
        ("x.jsonl", "x.jsonl.gz"),
        ("x.jsonl", "x.jsonl.zst"),
        ("x.json.gz", "x.jsonl"),
        ("x.json.zst", "x.json.gz"),
        ("x.jsonl", "x.parquet"),
        ("deep/er/x.parquet", "deep/er/x.jsonl.gz"),
    ],
)
def test_one_text_in_two_forms_is_refused_with_both_names(pair: tuple[str, str], tmp_path: Path) -> None:
    put(tmp_path, *pair)
    with pytest.raises(DataError, match="the text would be read twice") as error:
        list_files(tmp_path)
    assert {Path(error.value.file).name, error.value.message.split()[2]} == {Path(name).name for name in pair}


def test_names_that_are_alike_in_other_folders_are_other_texts(tmp_path: Path) -> None:
    put(tmp_path, "a/x.jsonl", "b/x.jsonl.gz", "x.1.jsonl", "x.jsonl")
    assert len(list_files(tmp_path)) == 4


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", ["y.jsonl", "deep/x.jsonl"])
def test_a_link_to_a_sibling_is_refused(name: str, link: object, tmp_path: Path) -> None:
    put(tmp_path, "x.jsonl")
    (tmp_path / "deep").mkdir()
    link(tmp_path / "x.jsonl", tmp_path / name)  # type: ignore[operator]
    with pytest.raises(
        DataError, match=r"x\.jsonl: is the file .*\.jsonl by another name|y\.jsonl: is the file .*x\.jsonl"
    ):
        list_files(tmp_path)


def test_what_two_sources_share_is_refused(tmp_path: Path) -> None:
    book, c4 = put(tmp_path / "book", "x.jsonl"), put(tmp_path / "c4", "y.jsonl", content=TEXT * 2)
    refuse_shared({"book": book, "c4": c4})
    with pytest.raises(DataError, match=r"book: c4: lies in .*, which is all|which is book"):
        refuse_shared({"book": tmp_path, "c4": c4})
    (c4 / "deep").symlink_to(book)
    with pytest.raises(DataError, match=r"c4/deep/x\.jsonl: c4: is the file .*book/x\.jsonl of book"):
        refuse_shared({"book": book, "c4": c4})
    (c4 / "deep").unlink()
    (c4 / "z.jsonl").hardlink_to(book / "x.jsonl")
    with pytest.raises(DataError, match=r"z\.jsonl: c4: is the file .*book/x\.jsonl of book"):
        refuse_shared({"book": book, "c4": c4})


def test_one_source_inside_another_is_refused_by_the_command(small_corpus: Path, tmp_path: Path) -> None:
    put(tmp_path / "raw/book", "x.jsonl")
    (tmp_path / "raw/c4").symlink_to(tmp_path / "raw/book")
    arguments = ("--input", tmp_path / "raw", "--output", tmp_path / "out", "--row-length", 2)
    result = build_amber("tokenize", *arguments, "--tokenizer", small_corpus / "tokenizer.json", check=False)
    assert result.returncode == 1
    assert f"{tmp_path}/raw/book: " in result.stderr and "lies in" in result.stderr
    assert not (tmp_path / "out").exists()


def test_copies_are_named(tmp_path: Path) -> None:
    book = put(tmp_path / "book", "x.jsonl", "x copy.jsonl", "deep/x (1).jsonl")
    put(book, "short.jsonl", "short_too.jsonl", content=b'{"text": "a licence"}\n')  # a source has its duplicates
    put(book, "a.jsonl.gz", "b.jsonl.gz", content=gzip.compress(TEXT * 9))
    long = b'{"text": "' + b"x" * 100_000 + b'"}\n'
    put(book, "long.jsonl", content=long + TEXT)
    put(book, "longer.jsonl", content=long + TEXT.replace(b"two", b"six"))  # differ behind what is read first
    c4 = put(tmp_path / "c4", "short.jsonl", content=b'{"text": "a licence"}\n')
    said = [line.removeprefix(f"{tmp_path}/") for line in list_copies({"book": book, "c4": c4})]
    first = f"{book}/deep/x (1).jsonl"
    assert sorted(said) == [
        f"book/b.jsonl.gz is a copy of {book}/a.jsonl.gz: its text is taken twice",
        f"book/x copy.jsonl is a copy of {first}: its text is taken twice",
        f"book/x.jsonl is a copy of {first}: its text is taken twice",
    ]
    put(c4, "z.jsonl", content=TEXT)
    with pytest.raises(DataError, match=r"c4/z\.jsonl: c4: is a copy of .*deep/x \(1\)\.jsonl of book"):
        list_copies({"book": book, "c4": c4})


@pytest.mark.parametrize(
    "name",
    [
        *("y.jsonl.incomplete", "y.jsonl.gz.crdownload", "y.jsonl.gz.aria2", "y.parquet.part", "y.jsonl.zst.download"),
        *(
            "y.jsonl.gz_.gstmp",
            "deep/y.jsonl.partial",
            "y.jsonl.tmp",
            "y.JSONL.!qB",
            "y.jsonl.filepart",
            "y.json.gz.st",
        ),
        *(".y.jsonl.gz.aB3xYz", "deep/.y.parquet.Zk09Qw", ".y.jsonl.part", ".azDownload-0f1e-y.jsonl"),
        ".cache/huggingface/download/data/y.jsonl.0123abcd.incomplete",
    ],
)
def test_a_download_that_has_not_ended_is_refused(name: str, tmp_path: Path) -> None:
    put(tmp_path, "x.jsonl", name)
    with pytest.raises(DataError, match="is a download or a copy that has not ended") as error:
        list_files(tmp_path)
    assert error.value.file == str(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "holds"),
    [
        (TEXT, True),
        (b'\xef\xbb\xbf\n {\n "id": [1, {"a": "}"}],\n "meta": null,\n "content": "a\\"b"}', True),
        (b'[\n{"id": 1, "text": "' + b"x" * 100_000 + b'"}]', True),
        (b'{"added_tokens": [{"content": "<s>"}], "model": {"text": "x"}}', False),
        (b'{"text": {"dtype": "string"}, "content": 5}', False),
        (b'{"splits": "' + b"x" * 100_000 + b'", "text": "a"}', False),
        (b"[" * 100_000, False),
        (b'{"a": ' + b"[" * 60_000, False),
        (b"[1, 2]", False),
        (b"", False),
        (b"text", False),
    ],
)
def test_json_is_told_by_its_first_object(content: bytes, holds: bool, tmp_path: Path) -> None:
    put(tmp_path, "x.jsonl")
    put(tmp_path, "y.json", content=content)
    if holds:
        with pytest.raises(DataError, match=r"y\.json: holds documents, it seems, but only \.jsonl"):
            list_files(tmp_path)
    else:
        assert list_files(tmp_path) == [tmp_path / "x.jsonl"]
        assert "'y.json'" in list_left_out(tmp_path)[0]


def test_what_is_passed_over_is_said(tmp_path: Path) -> None:
    put(tmp_path, "x.jsonl", "deep/github/y.jsonl", "deep/github/more/z.parquet", ".git/config", ".z.jsonl", ".nfs01")
    put(tmp_path, "x.jsonl.sha256", "_SUCCESS", "y.csv", "deep/z.txt", content=b"")
    assert list_left_out(tmp_path) == [
        "folder 'deep/github' with 2 files of documents is left out: RedPajama's github subset is not in the mix"
        " (paper, Table 2)",
        "4 files are neither JSONL nor Parquet and left out: '_SUCCESS', 'deep/z.txt', 'x.jsonl.sha256', 'y.csv'",
        "2 hidden files and folders are left out: '.git', '.z.jsonl'",
    ]
    assert list_files(tmp_path) == [tmp_path / "x.jsonl"]


def packed_with_a_dictionary(text: bytes) -> bytes:
    samples = [json.dumps({"text": f"sample {i} of {i * i}"}).encode() for i in range(500)]
    return zstandard.ZstdCompressor(dict_data=zstandard.train_dictionary(1000, samples)).compress(text)


def with_a_window_of(bits: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=bits, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(TEXT) + packer.flush()


def parquet(text: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [text.decode()]}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl.zst", with_a_window_of(31), "is packed with a window of 2,048 MiB.*zstd -d --long=31"),
        ("x.jsonl.zst", zstandard.compress(TEXT) + with_a_window_of(28), "is packed with a window of 256 MiB"),
        ("x.jsonl.zst", packed_with_a_dictionary(TEXT), "is packed with a dictionary.*zstd -d -D"),
        ("x.jsonl.zst", zstandard.compress(TEXT)[:-3], "cannot decompress: the file ends inside.*fetch or copy"),
        ("x.jsonl.zst", zstandard.compress(TEXT) + b"junk", "cannot decompress: .*fetch or copy"),
        ("x.jsonl.gz", gzip.compress(TEXT)[:-3], "cannot decompress: .*fetch or copy"),
        ("x.jsonl.gz", TEXT, "is plain text, its name says gzip.*rename"),
        ("x.jsonl.gz", zstandard.compress(TEXT), "is zstd, its name says gzip.*rename"),
        ("x.jsonl", gzip.compress(TEXT), "is gzip, its name says plain text.*rename"),
        ("x.jsonl", b"\xfd7zXZ\0more", "is xz, its name says plain text"),
        ("x.jsonl", parquet(TEXT), "is Parquet, its name says plain text"),
        (
            "x.jsonl",
            b"<!DOCTYPE html><html>please sign in",
            "is a web page.*fetch the file itself",
        ),
        (
            "x.jsonl",
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a pointer of Git LFS.*git lfs pull",
        ),
        ("x.jsonl", TEXT.decode().encode("utf-16"), "is UTF-16, no file of documents.*iconv"),
        ("x.parquet", TEXT, "cannot read: it is no Parquet file, or is cut short"),
        ("x.parquet", parquet(TEXT)[:-4] + b"PARE", "is encrypted Parquet.*in the clear"),
        ("x.parquet", parquet(TEXT)[:-8] + b"\xff\xff\xff\x7fPAR1", "says that its footer has 2,147,483,647 bytes"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_helps(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    put(tmp_path, name, content=content)
    with pytest.raises(DataError, match=rf"(?s){name}: {says}"):
        list(read_documents(tmp_path, Task(name, 0, None)))


def test_what_zstd_reads_without_being_asked_is_read(tmp_path: Path) -> None:
    skipped = b"\x50\x2a\x4d\x18\x05\0\0\0hello"  # a skippable frame, as pzstd and seekable files have
    put(tmp_path, "x.jsonl.zst", content=skipped + with_a_window_of(27) + skipped + zstandard.compress(TEXT) + skipped)
    assert [d.text for d in read_documents(tmp_path, Task("x.jsonl.zst", 0, None))] == ["one", "two"] * 2
