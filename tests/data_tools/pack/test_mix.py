"""`mix` takes nothing that is not what `tokenize` wrote, whole or one array task at a time."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_tools.files.errors import DataError
from data_tools.pack import mix as mix_module
from data_tools.pack import rows as rows_module
from data_tools.pack.mix import MixOptions, mix
from data_tools.pack.rows import PAGE_BYTES
from data_tools.pack.tokenize_source import tokenize_source
from tests.data_tools.conftest import ROOT
from tests.data_tools.test_durability import tree

OPTIONS = MixOptions(num_segments=3, direct=True, held_out_per_source=2, seed=1)


@pytest.fixture
def rows(small_corpus: Path, tmp_path: Path) -> Path:
    """Two sources, one in several parts."""
    for source in ("wikipedia", "starcoderdata"):
        folder = small_corpus / source
        tokenize_source(
            source, folder, tmp_path / "rows", small_corpus / "tokenizer.json", row_length=65, task_bytes=1 << 15
        )
    return tmp_path / "rows"


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))  # an id that the vocabulary has too


@pytest.mark.parametrize("direct", [True, False])
def test_no_array_task_takes_rows_damaged_since_they_were_tokenised(rows: Path, tmp_path: Path, direct: bool) -> None:
    options = MixOptions(3, direct, 2, 1)
    mix(rows, tmp_path / "undisturbed", options)
    expected = tree(tmp_path / "undisturbed")
    chance = random.Random(0)
    for attempt in range(12):
        part = chance.choice(sorted(path for path in rows.glob("*/part_*.tokens") if path.stat().st_size))
        size = part.stat().st_size
        at = chance.randrange(size)
        flip(part, at)
        out, refused = tmp_path / str(attempt), 0
        for segment in range(3):
            try:
                mix(rows, out, options, range(segment, segment + 1))
            except DataError as error:
                refused += 1
                assert error.file == str(part)
                assert f"damaged within 4096 bytes from byte {at // PAGE_BYTES * PAGE_BYTES}:" in error.message
        assert refused == 3 or at > size - PAGE_BYTES  # a page has 31 rows, the last one fewer, which may be dropped
        for path, content in tree(out).items():
            assert content == expected[path]
        flip(part, at)
    for segment in range(3):
        mix(rows, out, options, range(segment, segment + 1))
    mix(rows, out, options)
    assert tree(out) == expected


def test_a_finished_mix_reads_no_row_again(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mix(rows, tmp_path / "out", OPTIONS)
    monkeypatch.setattr(rows_module.SourceRows, "read", None)
    mix(rows, tmp_path / "out", OPTIONS)


@pytest.mark.parametrize("change", [Path.unlink, lambda path: flip(path, 3)])
def test_page_digests_that_are_gone_or_damaged_are_named(rows: Path, tmp_path: Path, change: Callable) -> None:
    change(rows / "wikipedia/part_00000.pages")
    with pytest.raises(DataError, match=r"(?s)part_00000\.pages: missing or damaged.*remove .*part_00000\.json"):
        mix(rows, tmp_path / "out", OPTIONS)


@pytest.mark.parametrize("value", [None, -1, "3", 10**30, 0.5, [], {}, True])
@pytest.mark.parametrize("name", ["rows", "row_length", "parts", "tokenizer", "vocab_size", "source", "rejected"])
def test_a_damaged_field_of_a_source_or_a_part_is_named(
    rows: Path, small_corpus: Path, tmp_path: Path, name: str, value: object
) -> None:
    path = rows / "wikipedia/source.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, name: value}))
    with pytest.raises(DataError, match=r"source\.json: digest: the content does not match its own digest"):
        mix(rows, tmp_path / "out", OPTIONS)
    part = rows / "wikipedia/part_00000.json"
    part.write_text(json.dumps({**json.loads(part.read_text()), "tokens": value}))
    folder, tokenizer = small_corpus / "wikipedia", small_corpus / "tokenizer.json"
    with pytest.raises(DataError, match=r"part_00000\.json: digest: the content does not match its own digest"):
        tokenize_source("wikipedia", folder, rows, tokenizer, row_length=65, task_bytes=1 << 15)
    part.unlink()
    tokenize_source("wikipedia", folder, rows, tokenizer, row_length=65, task_bytes=1 << 15)  # as the remedies say
    assert json.loads(path.read_text()) == record


def test_a_source_is_what_its_folder_is_called(rows: Path, tmp_path: Path) -> None:
    (rows / "wikipedia").rename(rows / "book")
    with pytest.raises(DataError, match=r"book/source\.json: is the record of wikipedia"):
        mix(rows, tmp_path / "out", OPTIONS)


@pytest.mark.parametrize("what", ["journal", "partial"])
def test_what_an_unfinished_mix_left_is_checked_before_it_goes_on(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    mix(rows, tmp_path / "undisturbed", OPTIONS)
    out = tmp_path / "out"
    monkeypatch.setattr(mix_module, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(mix_module, "JOURNAL_BYTES", 1 << 15)

    class Stopped(Exception):
        pass

    def stop_after_a_journal(self: mix_module._Mixer, *arguments: object) -> None:
        written(self, *arguments)
        raise Stopped

    written = mix_module._Mixer._write_journal
    with monkeypatch.context() as patch, contextlib.suppress(Stopped):
        patch.setattr(mix_module._Mixer, "_write_journal", stop_after_a_journal)
        mix(rows, out, OPTIONS)
    flip(next(out.glob("mix.journal" if what == "journal" else "segment_001.bin.partial")), 100)
    says = r"mix\.journal: " if what == "journal" else r"segment_001\.bin\.partial: not as its journal says"
    with pytest.raises(DataError, match=says):
        mix(rows, out, OPTIONS)
    (out / "mix.journal").unlink()
    mix(rows, out, OPTIONS)
    assert tree(out) == tree(tmp_path / "undisturbed")


def test_a_jsonl_segment_that_is_gone_or_cut_is_not_a_finished_one(rows: Path, tmp_path: Path) -> None:
    options = MixOptions(3, False, 0, 1)
    mix(rows, tmp_path / "out", options)
    path = tmp_path / "out/train_001.jsonl"
    os.truncate(path, 100)
    with pytest.raises(DataError, match=r"(?s)train_001\.jsonl: its size is not.*remove .*train_001\.json"):
        mix(rows, tmp_path / "out", options)
    path.unlink()
    with pytest.raises(DataError, match=r"train_001\.jsonl: no such file"):
        mix(rows, tmp_path / "out", options)


def test_many_segments_are_many_open_files(rows: Path, tmp_path: Path) -> None:
    command = [sys.executable, "data_tools/build_amber.py", "mix", "--input", str(rows), "--num-segments", "200"]

    def run(highest: int) -> subprocess.CompletedProcess[str]:
        limit = f"ulimit -n {highest} && ulimit -Sn 100 && exec "
        line = limit + shlex.join([*command, "--output", str(tmp_path / str(highest)), "--direct"])
        return subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)

    assert run(300).returncode == 0
    refused = run(200)
    assert refused.returncode == 1
    assert f"error: {tmp_path / '200'}: 200 segments grow together, but this process may open 200" in refused.stderr
    assert not list((tmp_path / "200").glob("segment_*"))


def test_one_text_in_two_sources_is_refused_whatever_tokenised_them(small_corpus: Path, tmp_path: Path) -> None:
    def texts(*documents: str) -> bytes:
        return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in documents)

    book, arxiv, raw = texts("one", "two words"), texts(*map(str, range(99))), tmp_path / "raw"
    licence = texts("a licence that many have")
    files = {
        "book": {"a.jsonl": book, "b.jsonl": arxiv, "licence.jsonl": licence, "none.jsonl": b""},
        "c4": {"licence.jsonl": licence, "none.jsonl": b"", "x.jsonl": texts("three", "four")},
        "arxiv": {"only.jsonl.gz": gzip.compress(arxiv)},
        "wikipedia": {"large.jsonl": texts("other", "words")},
    }
    for source, contents in files.items():
        (raw / source).mkdir(parents=True)
        for name, content in contents.items():
            (raw / source / name).write_bytes(content)
        tokenize_source(source, raw / source, tmp_path / "rows", small_corpus / "tokenizer.json", row_length=2)
    options = MixOptions(2, True, 0, 1)
    with pytest.raises(DataError, match=r"rows/book: b\.jsonl has the text of only\.jsonl\.gz, which is in arxiv"):
        mix(tmp_path / "rows", tmp_path / "out", options, range(1))
    (tmp_path / "rows/arxiv").rename(tmp_path / "arxiv")
    mix(tmp_path / "rows", tmp_path / "out", options)  # a licence and an empty file are no text of two sources
    shutil.rmtree(tmp_path / "rows/book")
    (tmp_path / "arxiv").rename(tmp_path / "rows/arxiv")
    with pytest.raises(DataError, match="has rows of book, c4, wikipedia; the sources are arxiv, c4, wikipedia now"):
        mix(tmp_path / "rows", tmp_path / "out", options)


@pytest.mark.parametrize("together", [False, True], ids=["alone", "with others"])
def test_a_large_file_and_its_compressed_form_are_one_text(small_corpus: Path, tmp_path: Path, together: bool) -> None:
    """The plain one is read in tasks, each with a digest of its own, the other in one."""
    raw, rows, tokenizer = tmp_path / "raw", tmp_path / "rows", small_corpus / "tokenizer.json"
    lines = [json.dumps({"text": f"{number} " * 9}).encode() + b"\n" for number in range(2000)]
    task_bytes = len(b"".join(lines)) // 3  # in the middle of a line
    files = {"book/x.jsonl": b"".join(lines), "c4/y.jsonl.gz": gzip.compress(b"".join(lines), 9)}
    if together:
        files["c4/a.jsonl"] = b'{"text": "one"}\n{"text": "two"}\n'
    for name, content in files.items():
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_bytes(content)
    for source in ("book", "c4"):
        tokenize_source(source, raw / source, rows, tokenizer, row_length=9, task_bytes=task_bytes)
    with pytest.raises(DataError, match=r"(x|y)\.jsonl\S* has the text of (x|y)\.jsonl"):
        mix(rows, tmp_path / "out", MixOptions(1, True, 0, 1))


def test_documents_held_out_whole_are_every_row_of_theirs(small_corpus: Path, rows: Path, tmp_path: Path) -> None:
    """Of documents tokenised apart, in an order drawn by the seed; none of theirs is among the segments."""
    held = tmp_path / "held"
    for source, text in (("wikipedia", "the quick brown fox "), ("starcoderdata", "return None # ")):
        (tmp_path / "apart" / source).mkdir(parents=True)
        documents = [json.dumps({"text": f"{i} {text * 40}"}) + "\n" for i in range(30)]
        (tmp_path / "apart" / source / "x.jsonl").write_text("".join(documents))
        folder, tokenizer = tmp_path / "apart" / source, small_corpus / "tokenizer.json"
        tokenize_source(source, folder, held, tokenizer, row_length=65)
    mix(rows, tmp_path / "without", MixOptions(3, True, 0, 1))
    written = {}
    for seed in (1, 2):
        out = tmp_path / f"with_{seed}"
        manifest = mix(rows, out, MixOptions(3, True, 0, seed), held_out=held)
        assert manifest.held_out.rows > 60
        codes = np.fromfile(out / "held_out.src", np.uint8)
        written[seed] = np.column_stack([np.fromfile(out / "held_out.bin", "<u2").reshape(-1, 65), codes])
        for k in range(3):
            assert (out / f"segment_00{k}.bin").read_bytes() == (
                tmp_path / "without" / f"segment_00{k}.bin"
            ).read_bytes()
    expected = []
    for source in ("wikipedia", "starcoderdata"):
        tail = json.loads((held / source / "source.json").read_text())["tail_tokens"]
        ids = np.fromfile(held / source / "part_00000.tokens", "<u2")[: -1 * tail or None].reshape(-1, 65)
        expected.append(np.column_stack([ids, np.full(len(ids), manifest.sources.index(source), "<u2")]))
    expected = np.concatenate(expected)
    assert not np.array_equal(written[1], written[2])
    for found in (*written.values(), expected):
        found[:] = found[np.lexsort(found.T)]
    assert np.array_equal(written[1], expected) and np.array_equal(written[2], expected)
    shutil.rmtree(held)
    tokenize_source("wikipedia", tmp_path / "apart" / "wikipedia", held, small_corpus / "tokenizer.json", row_length=64)
    with pytest.raises(DataError, match="row_length 64 differs"):
        mix(rows, tmp_path / "other", MixOptions(3, True, 0, 1), held_out=held)
