"""`tokenize`: every kind of file, bad documents, any number of processes, long documents, literal control tokens."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import xxhash
import zstandard

from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.pack.tokenize_source import tokenize_source
from data_tools.sources.documents import Task, plan_tasks, read_documents
from data_tools.sources.text_encoder import TextEncoder
from tests.data_tools.conftest import build_amber

TEXTS = [
    "one",
    "",
    "two words\n",
    "</s> and <s> and <unk>",
    "\u2603 caf\u00e9 \U0001f600",
    " lead",
    "tail ",
    "\ta\r\n  b",
]


def stream_of(folder: Path) -> list[int]:
    manifest = json.loads((folder / "source.json").read_text())
    parts = [np.fromfile(folder / f"{part['name']}.tokens", "<u2") for part in manifest["parts"]]
    return np.concatenate(parts).tolist()


@pytest.fixture
def encoder(small_corpus: Path) -> TextEncoder:
    return TextEncoder(small_corpus / "tokenizer.model")


def write(folder: Path, kind: str, field: str) -> None:
    folder.mkdir(parents=True)
    lines = b"".join(json.dumps({"id": i, field: text}).encode() + b"\n" for i, text in enumerate(TEXTS))
    if kind == "jsonl":
        (folder / "x.jsonl").write_bytes(lines)
    elif kind == "gz":
        (folder / "x.jsonl.gz").write_bytes(gzip.compress(lines))
    elif kind == "zst":
        (folder / "x.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(TEXTS))), field: TEXTS}), folder / "x.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "parquet"])
@pytest.mark.parametrize("field", ["text", "content"])
def test_every_kind_of_file_gives_the_hugging_face_ids(
    kind: str, field: str, encoder: TextEncoder, tmp_path: Path
) -> None:
    write(tmp_path / "raw", kind, field)
    tokenize_source("c4", tmp_path / "raw", tmp_path / "out", encoder.path, row_length=5)
    expected = [i for text in TEXTS for i in encoder.encode_reference(text)]
    assert stream_of(tmp_path / "out" / "c4") == expected
    manifest = json.loads((tmp_path / "out" / "c4" / "source.json").read_text())
    path = next((tmp_path / "raw").iterdir())
    content = path.read_bytes()
    content = {"gz": gzip.decompress, "zst": zstandard.decompress}.get(kind, bytes)(content)
    assert manifest["parts"][0]["input_digest"] == xxhash.xxh3_128_hexdigest(content)
    assert (manifest["rows"], manifest["tail_tokens"]) == divmod(len(expected), 5)
    tail = np.fromfile(tmp_path / "out" / "c4" / "tail.tokens", "<u2").tolist()
    assert tail == expected[len(expected) - len(expected) % 5 :]


def test_the_model_and_the_json_give_the_same_ids(small_corpus: Path, encoder: TextEncoder) -> None:
    other = TextEncoder(small_corpus / "tokenizer.json")
    np.testing.assert_array_equal(encoder.encode(TEXTS)[0], other.encode(TEXTS)[0])
    model = sentencepiece.SentencePieceProcessor(model_file=str(encoder.path))
    for text in TEXTS:
        if "<" not in text:  # the two differ where a text holds a control token literally
            assert encoder.encode_reference(text) == [*model.encode(text), encoder.eos_id], text
    assert encoder.eos_id in encoder.encode_reference("a</s>b")[:-1]


def test_folders_of_a_source_are_one_source_and_github_is_left_out(encoder: TextEncoder, tmp_path: Path) -> None:
    for i, name in enumerate(["b/python", "a", "b/github", "github", "c"]):
        folder = tmp_path / "raw" / name
        folder.mkdir(parents=True)
        (folder / "x.jsonl").write_text(json.dumps({"content": str(i)}) + "\n")
    tokenize_source("starcoderdata", tmp_path / "raw", tmp_path / "out", encoder.path, row_length=2)
    expected = [i for text in ("1", "0", "4") for i in encoder.encode_reference(text)]
    assert stream_of(tmp_path / "out" / "starcoderdata") == expected


def test_the_number_of_processes_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    trees = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        tokenize_source(
            "stackexchange", corpus / "stackexchange", out, corpus / "tokenizer.model",
            row_length=100, workers=workers, task_bytes=1 << 16,
        )  # fmt: skip
        trees.append({path.name: path.read_bytes() for path in (out / "stackexchange").iterdir()})
    assert len(trees[0]) > 30  # 2 a task; Python 3.13 has shorter docstrings, so its corpus makes fewer
    assert trees[0] == trees[1]


@pytest.mark.parametrize("task_bytes", [1, 7, 50, 64, 1000])
def test_tasks_share_out_every_line_once(tmp_path: Path, task_bytes: int) -> None:
    lines = [json.dumps({"text": "x" * n}) for n in (0, 5, 40, 41, 42, 90, 1)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    tasks = plan_tasks(tmp_path, task_bytes)
    texts = [document.text for task in tasks for document in read_documents(tmp_path, task)]
    assert texts == [json.loads(line)["text"] for line in lines]


BAD = [
    (b'{"text": 5}', "line 2: the text is not a string"),
    (b'{"other": "x"}', "line 2: no text or content field"),
    (b'{"text": null, "content": "x"}', "line 2: the text is null"),
    (b'{"text": "\\ud800"}', "line 2: character 0 of the text is half of a surrogate pair"),
    (b'{"text": "x"', "line 2 column 13: "),
    (b'["x"]', "line 2: not a JSON object"),
    (b'{"text": "\xff"}', "line 2: not JSON in UTF-8"),
    (b"[" * 100_000, "line 2: not JSON in UTF-8"),
]


@pytest.mark.parametrize(("line", "says"), BAD)
def test_a_bad_document_stops_the_run_or_is_set_aside(
    line: bytes, says: str, encoder: TextEncoder, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "x.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(DataError) as error:
        tokenize_source("book", raw, tmp_path / "out", encoder.path, row_length=2)
    assert f"{raw / 'x.jsonl'}: {says}" in str(error.value)
    manifest = tokenize_source("book", raw, tmp_path / "out", encoder.path, row_length=2, policy=ErrorPolicy(True))
    assert (manifest["rejected"], manifest["documents"]) == (1, 2)
    rejected = json.loads((tmp_path / "out" / "book" / "part_00000.rejected.jsonl").read_bytes())
    assert (rejected["place"] + ": " + rejected["reason"]).startswith(says.removesuffix(": "))
    if "row" in rejected:
        assert rejected["row"].encode() == line
    with pytest.raises(DataError, match="1 bad documents, more than 0"):
        tokenize_source("book", raw, tmp_path / "out", encoder.path, row_length=2, policy=ErrorPolicy(True, 0))


def test_a_document_of_50_mb_is_no_special_case(corpus: Path, encoder: TextEncoder, tmp_path: Path) -> None:
    text = "".join(json.loads(line)["text"] for line in (corpus / "starcoderdata" / "library.jsonl").open())
    text = (text * 20)[:50_000_000]
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "x.jsonl").write_text(json.dumps({"text": text}) + "\n")
    manifest = tokenize_source("book", raw, tmp_path / "out", encoder.path, row_length=2049)
    assert (manifest["characters"], manifest["documents"]) == (50_000_000, 1)
    ids = np.fromfile(tmp_path / "out" / "book" / "part_00000.tokens", "<u2")
    assert ids[-1] == encoder.eos_id
    beginning = encoder.encode_reference(text[:100_000])[:-10]  # a cut changes the last ids alone
    assert ids[: len(beginning)].tolist() == beginning


def test_a_tokenizer_that_does_not_fit_is_refused(small_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    (tmp_path / "tokenizer.json").write_text("{}")
    for path, says in (
        (tmp_path / "tokenizer.model", "not a sentencepiece model"),
        (tmp_path / "tokenizer.json", "cannot load"),
        (tmp_path / "none.json", "no such tokenizer"),
    ):
        result = build_amber(
            *("tokenize", "--input", small_corpus, "--output", tmp_path / "out", "--tokenizer", path), check=False
        )
        assert result.returncode == 1
        assert says in result.stderr
        assert "Traceback" not in result.stderr


def test_gigatoken_differing_from_the_reference_is_refused(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = TextEncoder.encode

    def wrong(self: TextEncoder, texts: list[str]):
        stream, lengths = good(self, texts)
        stream[3] += 1
        return stream, lengths

    encoder.check(TEXTS, Path("raw"))
    monkeypatch.setattr(TextEncoder, "encode", wrong)
    with pytest.raises(DataError, match="differ from token"):
        encoder.check(TEXTS, Path("raw"))


def test_finished_parts_of_other_options_are_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    write(tmp_path / "raw", "jsonl", "text")
    tokenize_source("c4", tmp_path / "raw", tmp_path / "out", encoder.path, row_length=5)
    with pytest.raises(DataError, match="made from other input or with other options"):
        tokenize_source("c4", tmp_path / "raw", tmp_path / "out", encoder.path, row_length=6)


def test_a_task_of_a_compressed_file_is_the_whole_file(tmp_path: Path) -> None:
    write(tmp_path / "raw", "zst", "text")
    assert plan_tasks(tmp_path / "raw", 3) == [Task("x.jsonl.zst", 0, None)]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["jsonl", "gz", "zst", "parquet"])
def test_input_replaced_by_another_of_the_same_size_is_refused(
    kind: str, workers: int, encoder: TextEncoder, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    write(raw, kind, "text")
    (raw / "y.jsonl").write_text('{"text": "y"}\n')

    def tokenize() -> dict[str, Any]:
        return tokenize_source("c4", raw, tmp_path / "out", encoder.path, row_length=5, workers=workers)

    manifest = tokenize()
    path, old = next(raw.glob("x.*")), tmp_path / "old"
    size = path.stat().st_size
    shutil.copy2(path, old)
    for other in raw.iterdir():
        os.utime(other)  # only touched: read again, and found the same
    assert tokenize() == manifest
    TEXTS[0], before = "two", TEXTS[0]
    try:
        path.unlink()
        write(tmp_path / "new", kind, "text")
    finally:
        TEXTS[0] = before
    shutil.move(next((tmp_path / "new").iterdir()), path)
    os.truncate(path, size)
    with pytest.raises(
        DataError, match=r"x\..*: not what part_00000\.json was made from any more|cannot (decompress|read)"
    ):
        tokenize()
    shutil.copy2(old, path)  # as the remedy says
    assert tokenize() == manifest


def test_input_that_is_written_while_it_is_read_is_refused(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "raw", "jsonl", "text")
    encode = TextEncoder.encode

    def encode_and_write(self: TextEncoder, texts: list[str]) -> object:
        with (tmp_path / "raw" / "x.jsonl").open("a") as stream:
            stream.write('{"text": "more"}\n')
        return encode(self, texts)

    monkeypatch.setattr(TextEncoder, "encode", encode_and_write)
    for _ in range(2):
        with pytest.raises(DataError, match=r"x\.jsonl: changed while it was read"):
            tokenize_source("c4", tmp_path / "raw", tmp_path / "out", encoder.path, row_length=5)
    assert not (tmp_path / "out/c4/source.json").exists()
