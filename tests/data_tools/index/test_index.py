"""`index`, `merge` and `verify` on sound and on bad input, through the command line."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_tools.dataset.format import AMBER_SOURCES
from data_tools.dataset.segment_files import segments_lock
from data_tools.files.durable import FolderBusy
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.index.index_segments import index as index_in_process
from data_tools.index.index_segments import merge, plan_dataset
from data_tools.index.segment_reader import SegmentReader
from data_tools.index.verify import verify
from tests.data_tools.conftest import build_amber
from tests.data_tools.small_segments import ROW_LENGTH, ROWS, ids_of, index, lines_of, stored_ids, write_segments


@pytest.fixture
def amber(tmp_path: Path) -> Path:
    return write_segments(tmp_path)


def test_plain_gz_and_zst_and_both_names(amber: Path) -> None:
    index(amber)
    for k in range(3):
        base = amber.parent / "out" / f"segment_{k:03d}"
        assert stored_ids(base) == ids_of(lines_of(k))
        assert base.with_suffix(".src").read_bytes() == bytes(i % 7 for i in range(ROWS))
    manifest = json.loads((amber.parent / "out" / "manifest.json").read_text())
    assert (manifest["rows"], manifest["rows_per_segment"], manifest["vocab_size"]) == (150, 50, 32000)
    assert manifest["rows_per_source"] == {name: 24 if i == 0 else 21 for i, name in enumerate(AMBER_SOURCES)}
    build_amber("verify", "--input", amber.parent / "out")


def test_one_segment_at_a_time_then_merge(amber: Path) -> None:
    index(amber)
    whole = {path.name: path.read_bytes() for path in (amber.parent / "out").iterdir() if not path.name.startswith(".")}
    single = amber.parent / "single"
    arguments = ("--input", amber, "--output", single, "--row-length", ROW_LENGTH)
    build_amber("index", *arguments, "--segment", 2)
    result = build_amber("merge", *arguments, check=False)
    assert result.returncode == 1
    assert "2 of 3 are missing: segment_000, segment_001" in result.stderr
    assert "--array=0,1" in result.stderr
    build_amber("index", *arguments, "--segment", "0-1")
    build_amber("merge", *arguments)
    assert {path.name: path.read_bytes() for path in single.iterdir() if not path.name.startswith(".")} == whole


def test_a_task_needs_its_own_segment_alone_and_merge_names_what_is_missing(amber: Path) -> None:
    (amber / "train_0.jsonl").unlink()
    (amber / "train_001.jsonl").write_bytes(b"")  # beside train_001.jsonl.gz: twice there
    index(amber, "--segment", 2)
    assert stored_ids(amber.parent / "out" / "segment_002") == ids_of(lines_of(2))
    twice = "train_001.jsonl.gz: is segment 1, and so is train_001.jsonl\n"
    for segment, says in (("0", "segments are missing: 0\n"), ("1", twice), ("2-3", "segments are missing: 3\n")):
        result = index(amber, "--segment", segment, check=False)
        assert (result.returncode, says in result.stderr) == (1, True)
    (amber / "train_001.jsonl").unlink()
    index(amber, "--segment", 1)
    arguments = ("--input", amber, "--output", amber.parent / "out", "--row-length", ROW_LENGTH)
    for more, says in (((), "missing: 0\n"), (("--num-segments", 5), "missing: 0, 3, 4\n")):
        result = build_amber("merge", *arguments, *more, check=False)
        assert (result.returncode, says in result.stderr) == (1, True)


@pytest.mark.parametrize("name", ["train_003.jsonl.partial", "train_003.jsonl.bz2", "train_3.json"])
def test_a_last_segment_that_is_not_whole_or_cannot_be_read_is_missing(amber: Path, name: str) -> None:
    (amber / name).touch()
    result = index(amber, check=False)
    assert (result.returncode, "segments are missing: 3\n" in result.stderr) == (1, True)


def test_the_number_of_segments_is_as_said(amber: Path) -> None:
    for number, says in ((4, "segments are missing: 3\n"), (2, "amber: 3 segments, not 2\n")):
        result = index(amber, "--num-segments", number, check=False)
        assert (result.returncode, says in result.stderr) == (1, True)
    index(amber, "--num-segments", 3)


def test_a_segment_that_comes_after_the_end_is_refused(amber: Path) -> None:
    out = amber.parent / "out"

    def build(segments: range | None = None) -> None:
        index_in_process(
            amber, out, plan_dataset(amber, ROW_LENGTH, 32000, segments=segments), ErrorPolicy(), segments=segments
        )

    build()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    added = amber / "train_003.jsonl"
    added.write_bytes(b"\n".join(lines_of(3)))
    attempts: list[Callable[[], object]] = [
        build,
        lambda: build(range(3, 4)),
        lambda: merge(amber, out, plan_dataset(amber, ROW_LENGTH, 32000)),
    ]
    for attempt in attempts:
        with pytest.raises(DataError, match=r"was not there when .*/out was finished, with 3 segments") as error:
            attempt()
        assert error.value.file == str(added)
    assert {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".lock.")} == {
        name: content for name, content in before.items() if not name.startswith(".lock.")
    }
    build(range(1, 3))  # what it has is looked at as before
    (out / "manifest.json").unlink()  # as the remedy says
    build()
    assert json.loads((out / "manifest.json").read_text())["num_segments"] == 4


BAD = {
    3: b'{"token_ids": [1, 2], "source": "c4"}',
    4: b"\xff\xfe nonsense",
    20: lines_of(0)[20].replace(b"]", b", 32000]"),
}


def spoil(amber: Path) -> list[bytes]:
    lines = [BAD.get(i, line) for i, line in enumerate(lines_of(0))]
    (amber / "train_0.jsonl").write_bytes(b"\n".join(lines))
    return lines


def test_the_first_bad_row_stops_the_run(amber: Path) -> None:
    spoil(amber)
    result = index(amber, check=False)
    assert result.returncode == 1
    assert f"{amber / 'train_0.jsonl'}: line 4 column 20: 2 ids, expected 9\n  remedy: " in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((amber.parent / "out").glob("segment_000*"))


def test_bad_rows_are_set_aside_untouched(amber: Path) -> None:
    spoil(amber)
    index(amber, "--on-error", "quarantine", "--segment", 0)
    out = amber.parent / "out"
    assert stored_ids(out / "segment_000") == ids_of([line for i, line in enumerate(lines_of(0)) if i not in BAD])
    rejected = [json.loads(line) for line in (out / "segment_000.rejected.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in rejected] == [
        (4, "2 ids, expected 9"),
        (5, "expected '{'"),
        (21, "an id that is not below 32000"),
    ]
    back = [entry["row"].encode() if "row" in entry else base64.b64decode(entry["row_base64"]) for entry in rejected]
    assert back == list(BAD.values())
    assert json.loads((out / "segment_000.json").read_text())["rejected"] == 3


def test_above_the_limit_the_run_stops(amber: Path) -> None:
    spoil(amber)
    result = index(amber, "--on-error", "quarantine", "--max-rejected", 2, check=False)
    assert result.returncode == 1
    assert "line 21 column" in result.stderr
    assert "more than 2 bad rows, the last: an id that is not below 32000" in result.stderr


def test_segments_of_unequal_rows_are_no_data_set(amber: Path) -> None:
    spoil(amber)
    result = index(amber, "--on-error", "quarantine", check=False)
    assert result.returncode == 1
    assert "segment_001.json: 50 rows, but segment_000 has 47" in result.stderr


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_cut_short_is_refused(amber: Path, suffix: str) -> None:
    path = next(amber.glob(f"*.{suffix}"))
    path.write_bytes(path.read_bytes()[:-20])
    result = index(amber, check=False)
    assert result.returncode == 1
    assert re.search(f"{path}: cannot decompress: .*(end|incomplete)", result.stderr)
    assert not (amber.parent / "out" / "manifest.json").exists()


def test_other_input_for_finished_output_is_refused(amber: Path) -> None:
    index(amber)
    (amber / "train_0.jsonl").write_bytes(b"\n".join(lines_of(9)[:-1]))
    result = index(amber, check=False)
    assert result.returncode == 1
    assert "segment_000.json: made from other input or with other settings" in result.stderr


def test_other_input_of_the_same_size_is_refused_however_old_it_says_it_is(amber: Path) -> None:
    index(amber)
    path = amber / "train_0.jsonl"
    before = path.stat()
    os.utime(path)  # only touched: read again, and found the same
    assert "train_0.jsonl, touched since, again" in index(amber).stderr
    other = amber / "other"
    other.write_bytes(path.read_bytes().replace(b"1", b"2"))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert path.stat().st_size == before.st_size
    for command in ("index", "merge"):
        arguments = ("--input", amber, "--output", amber.parent / "out", "--row-length", ROW_LENGTH)
        result = build_amber(command, *arguments, check=False)
        assert result.returncode == 1
        assert f"error: {path}: not what segment_000 was made from any more" in result.stderr
    (amber / "train_001.jsonl.gz").write_bytes(b"x" * (amber / "train_001.jsonl.gz").stat().st_size)
    result = index(amber, "--segment", 1, check=False)
    assert f"error: {amber}/train_001.jsonl.gz: not what segment_001 was made from any more" in result.stderr


def test_input_that_is_written_while_it_is_read_is_refused(amber: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = SegmentReader.blocks

    def blocks_and_more(self: SegmentReader) -> Iterator[np.ndarray]:
        yield from blocks(self)
        with self.path.open("ab") as stream:
            stream.write(lines_of(0)[0])

    monkeypatch.setattr(SegmentReader, "blocks", blocks_and_more)
    out = amber.parent / "out"
    with pytest.raises(DataError, match=r"train_0\.jsonl: changed while it was read"):
        index_in_process(amber, out, plan_dataset(amber, ROW_LENGTH, None), ErrorPolicy())
    assert not list(out.glob("segment_*"))


def test_no_segments_and_missing_segments_are_refused(amber: Path) -> None:
    (amber / "train_001.jsonl.gz").unlink()
    result = index(amber, check=False)
    assert (result.returncode, "segments are missing: 1" in result.stderr) == (1, True)
    (amber / "train_20260101000000.jsonl").touch()  # named like a segment whose like nobody can count one by one
    result = index(amber, check=False)
    assert (result.returncode, "more; the last is 20260101000000" in result.stderr) == (1, True)
    for path in amber.iterdir():
        path.unlink()
    result = index(amber, check=False)
    assert (result.returncode, "no train_000.jsonl" in result.stderr) == (1, True)


MIX = {"num_segments": 1, "row_length": 9, "vocab_size": 10, "dropped_rows": 0, "rejected": 0, "has_held_out": False}
MIX["tokenizer"] = {"file": "tokenizer.json", "sha256": "", "vocab_size": 10}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("mix.json", "{}", "field missing or of the wrong type: 'num_segments'"),
        ("mix.json", json.dumps({**MIX, "tokenizer": {}}), "field missing or of the wrong type"),
        ("mix.json", json.dumps({**MIX, "num_segments": "1"}), "field missing or of the wrong type: 'str' object"),
        ("mix.json", "[" * 100_000, "not JSON"),
        ("tokenizer.json", "{}", "cannot load: "),
        ("train_0.json", '{"digests": 3}', "field missing or of the wrong type"),
    ],
)
def test_a_file_beside_the_segments_that_is_not_what_it_should_be_is_named(
    amber: Path, name: str, content: str, says: str
) -> None:
    (amber / name).write_text(content)
    result = index(amber, check=False)
    assert result.returncode == 1
    assert f"error: {amber / name}: {says}" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_not_a_plain_file_is_no_segment(amber: Path, make: Callable[[Path], None]) -> None:
    (amber / "train_001.jsonl.gz").unlink()
    make(amber / "train_001.jsonl")
    result = index(amber, check=False)
    assert (result.returncode, "train_001.jsonl: not a plain file" in result.stderr) == (1, True)


def test_a_damaged_gz_says_what_is_wrong(amber: Path) -> None:
    path = amber / "train_001.jsonl.gz"
    path.write_bytes(path.read_bytes() + b"garbage")
    assert f"{path}: cannot decompress: Not a gzipped file" in index(amber, "--segment", 1, check=False).stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--vocab-size", "65537"), "'65537' is not a whole number from 1 to 65536"),
        (("--row-length", "0"), "'0' is not a whole number of at least 1"),
        (("--threads", "many"), "'many' is not a whole number of at least 1"),
        (("--max-rejected", "-1"), "'-1' is not a whole number of at least 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(amber: Path, arguments: tuple[str, str], says: str) -> None:
    result = build_amber("index", "--input", amber, "--output", amber.parent / "out", *arguments, check=False)
    assert (result.returncode, says in result.stderr) == (2, True)
    assert not (amber.parent / "out").exists()


@pytest.mark.parametrize("output", ["/proc/nowhere/out", "file/out"])
def test_a_folder_that_cannot_be_made_is_named_without_a_traceback(amber: Path, output: str) -> None:
    (amber.parent / "file").touch()
    folder = amber.parent / output
    result = build_amber("index", "--input", amber, "--output", folder, "--row-length", ROW_LENGTH, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and "remedy: check the path" in result.stderr


@pytest.mark.parametrize("threads", [1, 3])
def test_lines_longer_than_a_block_and_threads_change_nothing(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.index.segment_reader.BLOCK_BYTES", 128)
    path = tmp_path / "train_000.jsonl"
    lines = [line.replace(b", ", b" " * (i * 7) + b", ") for i, line in enumerate(lines_of(1))]
    path.write_bytes(b"\n".join(lines))
    reader = SegmentReader(path, ROW_LENGTH, 32000, ErrorPolicy(), AMBER_SOURCES, threads)
    ids = np.concatenate([block.copy() for block in reader.blocks()]).reshape(-1, ROW_LENGTH)
    assert ids.tolist() == ids_of(lines)
    assert (reader.rows, reader.lines, b"".join(reader.codes)) == (ROWS, ROWS, bytes(i % 7 for i in range(ROWS)))


def test_an_endless_line_is_refused_where_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.index.segment_reader.BLOCK_BYTES", 128)
    monkeypatch.setattr("data_tools.index.segment_reader.LONGEST_LINE", 1024)
    path = tmp_path / "train_000.jsonl"
    line = lines_of(1)[0]
    path.write_bytes(line + b"\n" + b"[" * 5000)
    with pytest.raises(DataError, match=f"line that starts at byte {len(line) + 1}: longer than 1024 bytes"):
        list(SegmentReader(path, ROW_LENGTH, 32000, ErrorPolicy(), AMBER_SOURCES).blocks())


def test_the_tasks_of_an_array_may_run_at_once(amber: Path, small_corpus: Path) -> None:
    (amber / "tokenizer.json").write_bytes((small_corpus / "tokenizer.json").read_bytes())
    lines = [re.sub(rb"\d\d+", b"7", line) for line in lines_of(0)]
    for path in amber.glob("train_*"):
        path.unlink()
    for k in range(8):
        (amber / f"train_{k:03d}.jsonl").write_bytes(b"\n".join(lines))
    out = amber.parent / "out"
    plan = plan_dataset(amber, ROW_LENGTH, None)
    waits, start = os.pipe()
    tasks = []
    for k in range(8):
        if not (child := os.fork()):
            os.close(start)
            os.read(waits, 1)  # all start when the other end closes
            code = 1
            with contextlib.suppress(BaseException):
                index_in_process(amber, out, plan, ErrorPolicy(), range(k, k + 1))
                code = 0
            os._exit(code)
        tasks.append(child)
    os.close(start)
    assert [os.waitstatus_to_exitcode(os.waitpid(task, 0)[1]) for task in tasks] == [0] * 8
    os.close(waits)
    assert merge(amber, out, plan).num_segments == 8
    assert verify(out) == []


def test_one_segment_is_built_by_one_process(amber: Path) -> None:
    out, plan = amber.parent / "out", plan_dataset(amber, ROW_LENGTH, None)
    with segments_lock(out, range(1, 2)):
        index_in_process(amber, out, plan, ErrorPolicy(), range(2, 3))
        for segments, place in ((range(3), ".lock.segment_001"), (range(1, 2), ".lock.segment_001"), (None, ".lock")):
            with pytest.raises(FolderBusy) as error:
                index_in_process(amber, out, plan, ErrorPolicy(), segments)
            assert error.value.place == place


def test_segments_of_another_data_set_and_too_many_of_them_are_not_merged(amber: Path) -> None:
    out = amber.parent / "out"
    index(amber)
    (amber / "train_001.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines_of(8)), 1))
    plan = plan_dataset(amber, ROW_LENGTH, None)
    with pytest.raises(DataError, match=r"segment_001\.json: made from other .*: bytes was \d+, now \d+\n"):
        merge(amber, out, plan)
    with pytest.raises(DataError, match=rf"settings: row_length was {ROW_LENGTH}, now 2049\n"):
        merge(amber, out, plan_dataset(amber, 2049, None))
    (amber / "train_002.jsonl.zst").unlink()
    (amber / "train_001.jsonl.gz").unlink()
    for command in (merge, lambda *arguments: index_in_process(*arguments, ErrorPolicy())):
        with pytest.raises(DataError, match="segment_001 is there, but the data set has 1 segments"):
            command(amber, out, plan_dataset(amber, ROW_LENGTH, None))
