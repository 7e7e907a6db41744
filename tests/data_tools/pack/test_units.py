"""Small files share a part; what became of a finished part's files is found out and named, anywhere in their list."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.files.durable import write_whole
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.files.json_file import canonical_json, read_sealed, sealed
from data_tools.pack import tokenize_source as stage
from data_tools.pack import units
from data_tools.pack.tokenize_source import tokenize_source
from data_tools.pack.tokenize_unit import Job
from data_tools.pack.units import Unit, pack
from data_tools.sources.documents import Task
from data_tools.sources.text_encoder import TextEncoder

FILES = 18  # whole units: one file more is a unit more


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "PACK_FILES", 6)


@pytest.fixture
def tokenizer(small_corpus: Path) -> Path:
    return small_corpus / "tokenizer.json"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    (folder / "in").mkdir(parents=True)
    for i in range(FILES):
        line = json.dumps({"text": f"document {i:02d}"}).encode() + b"\n"
        name = f"{'in/' if i % 3 else ''}{i:02d}.jsonl"
        path = folder / (name if i % 4 else name + ".gz")
        path.write_bytes(line if i % 4 else gzip.compress(line, mtime=0))
    return folder


def names(raw: Path) -> list[str]:
    return sorted(path.relative_to(raw).as_posix() for path in raw.rglob("*.jsonl*"))


def ids(out: Path) -> list[int]:
    parts = read_sealed(out / "book/source.json", "")["parts"]
    return np.concatenate([np.fromfile(out / f"book/{part['name']}.tokens", "<u2") for part in parts]).tolist()


def run(raw: Path, out: Path, tokenizer: Path, **more: Any) -> dict[str, Any]:
    return tokenize_source("book", raw, out, tokenizer, row_length=4, **more)


@pytest.mark.parametrize("sizes", [[5] * 7, [1, 20, 1, 1], [11, 1], [0, 0, 10, 0, 1]])
def test_units_hold_every_task_once_in_order_and_no_more_than_they_may(sizes: list[int]) -> None:
    tasks = [Task(str(i), 0, None) for i in range(len(sizes))]
    packed = pack(tasks, {str(i): size for i, size in enumerate(sizes)}, 10)
    assert [task for unit in packed for task in unit.tasks] == tasks
    assert all(unit.bytes <= 10 or len(unit.tasks) == 1 for unit in packed)
    assert all(a.bytes + b.sizes[0] > 10 for a, b in itertools.pairwise(packed))


def test_small_files_share_parts_and_give_the_ids_of_one_after_the_other(
    raw: Path, tmp_path: Path, tokenizer: Path
) -> None:
    encoder = TextEncoder(tokenizer)
    manifest = run(raw, tmp_path / "out", tokenizer)
    numbers = sorted(range(FILES), key=lambda i: next(n for n in names(raw) if f"{i:02d}.jsonl" in n))
    expected = [i for number in numbers for i in encoder.encode_reference(f"document {number:02d}")]
    assert ids(tmp_path / "out") == expected
    assert [part["files"] for part in manifest["parts"]] == [6, 6, 6]
    assert manifest["documents"] == FILES
    run(raw, tmp_path / "two", tokenizer, workers=2)
    for path in (tmp_path / "out/book").iterdir():
        assert path.read_bytes() == (tmp_path / "two/book" / path.name).read_bytes()


def resize(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def replace(path: Path) -> None:
    """Another file of the same size and, as copying tools give it, the same time of modification."""
    content = path.read_bytes()
    plain = path.suffix == ".jsonl"
    new = (content if plain else gzip.decompress(content)).replace(b"document", b"DOCUMENT")
    new = new if plain else gzip.compress(new, mtime=0)
    assert len(new) == len(content)
    other = path.with_name(".other")
    other.write_bytes(new)
    shutil.copystat(path, other)
    other.replace(path)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "removed": (Path.unlink, "'{name}': not there any more"),
    "renamed": (lambda path: path.rename(path.with_name("x" + path.name)), "'{name}': not there any more.*: new"),
    "emptied": (lambda path: path.write_bytes(b""), "'{name}': of another size"),
    "longer": (resize, "'{name}': of another size"),
    "replaced": (replace, "{name}: not what part_0000. was made from any more"),
    "added": (lambda path: shutil.copy(path, path.with_name("00new.jsonl")), "00new.jsonl': new"),
    "added at the end": (lambda path: shutil.copy(path, path.with_name("zz.jsonl")), "zz.jsonl': new"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_changed_after_a_finished_run_are_named(
    change: str, raw: Path, tmp_path: Path, tokenizer: Path
) -> None:
    manifest = run(raw, tmp_path / "out", tokenizer)
    do, says = CHANGES[change]
    listed = names(raw)
    for place in (0, 7, FILES - 1) if "added" not in change else (7,):
        again = tmp_path / f"raw{place}"
        shutil.copytree(raw, again)
        assert run(again, tmp_path / "out", tokenizer) == manifest  # a copy: read again, and found the same
        do(again / listed[place])
        wanted = says.replace("part_0000.", r"part_0000.\.json").format(name=listed[place])
        for _ in range(2):
            with pytest.raises(DataError, match=wanted):
                run(again, tmp_path / "out", tokenizer)
        shutil.rmtree(again)
    assert run(raw, tmp_path / "out", tokenizer) == manifest


def test_a_part_that_is_made_again_is_made_of_the_same_text(raw: Path, tmp_path: Path, tokenizer: Path) -> None:
    manifest = run(raw, tmp_path / "out", tokenizer)
    marker = tmp_path / "out/book/part_00001.json"
    marker.unlink()  # as a remedy says
    assert run(raw, tmp_path / "out", tokenizer) == manifest
    marker.unlink()
    replace(raw / names(raw)[7])
    with pytest.raises(DataError, match="part_00001 was made from other text before"):
        run(raw, tmp_path / "out", tokenizer)


def test_an_unfinished_run_goes_on_and_refuses_what_came_before_its_end(
    raw: Path, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = run(raw, tmp_path / "whole", tokenizer)
    real = stage.do

    def stopping(job: Job) -> int:
        if job.number == 2:
            raise KeyboardInterrupt
        return real(job)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "do", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(raw, tmp_path / "out", tokenizer)
    listed = names(raw)
    moved = tmp_path / "moved"
    (raw / listed[3]).rename(moved)
    with pytest.raises(DataError, match=f"'{listed[3]}': not there any more"):
        run(raw, tmp_path / "out", tokenizer)
    moved.rename(raw / listed[3])
    shutil.copy(raw / listed[-1], raw / "00new.jsonl")
    with pytest.raises(DataError, match=r"'00new\.jsonl': new"):
        run(raw, tmp_path / "out", tokenizer)
    (raw / "00new.jsonl").unlink()
    assert run(raw, tmp_path / "out", tokenizer) == manifest


@pytest.mark.parametrize("finished", [True, False])
def test_parts_of_a_file_each_as_they_were_before_are_kept(
    finished: bool, raw: Path, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(raw, tmp_path / "packed", tokenizer)
    with monkeypatch.context() as patch:  # what was written before there were units: a part a file
        patch.setattr(units, "PACK_FILES", 1)
        before = run(raw, out, tokenizer)
    assert len(before["parts"]) == FILES
    if not finished:
        (out / "book/source.json").unlink()
        for i in range(3, FILES):
            (out / f"book/part_{i:05d}.json").unlink()
    kept = (out / "book/part_00001.json").stat().st_ino
    assert run(raw, out, tokenizer) == before
    assert (out / "book/part_00001.json").stat().st_ino == kept
    assert ids(out) == ids(tmp_path / "packed")
    (raw / names(raw)[1]).write_bytes(b"")
    with pytest.raises(DataError, match=f"'{names(raw)[1]}': of another size"):
        run(raw, out, tokenizer)


def test_other_options_are_named(raw: Path, tmp_path: Path, tokenizer: Path) -> None:
    run(raw, tmp_path / "out", tokenizer)
    with pytest.raises(DataError, match="with other options: row_length 4, now 5"):
        tokenize_source("book", raw, tmp_path / "out", tokenizer, row_length=5)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_documents_of_all_files_count_and_too_many_stop_the_run(
    workers: int, raw: Path, tmp_path: Path, tokenizer: Path
) -> None:
    for name in names(raw)[::5]:  # in parts 0, 0, 1 and 2
        path = raw / name
        bad = b'{"text": null}\n'
        path.write_bytes(path.read_bytes() + (bad if path.suffix == ".jsonl" else gzip.compress(bad)))
    with pytest.raises(DataError, match=r"more than 2 bad documents, the last|[34] bad documents, more than 2"):
        run(raw, tmp_path / "out", tokenizer, policy=ErrorPolicy(True, 2), workers=workers)
    if workers == 1:
        assert not (tmp_path / "out/book/part_00002.json").exists()  # stopped as soon as they were too many
    manifest = run(raw, tmp_path / "out", tokenizer, policy=ErrorPolicy(True, 4), workers=workers)
    assert (manifest["rejected"], manifest["documents"]) == (4, FILES)
    lines = (tmp_path / "out/book/part_00000.rejected.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["file"] for line in lines] == [names(raw)[0], names(raw)[5]]


def test_a_record_that_is_none_is_named(raw: Path, tmp_path: Path, tokenizer: Path) -> None:
    run(raw, tmp_path / "out", tokenizer)
    marker = tmp_path / "out/book/part_00001.json"
    good = read_sealed(marker, "")
    for identity in ({}, {"options": {}}, {**good["identity"], "tasks": [["a"]]}, {**good["identity"], "tasks": 7}):
        write_whole(marker, canonical_json(sealed({**good, "identity": identity})))
        with pytest.raises(DataError, match=r"part_00001\.json: (field missing|made from other)"):
            run(raw, tmp_path / "out", tokenizer)


def test_a_unit_of_one_task_is_recorded_as_before_there_were_units() -> None:
    unit = Unit((Task("a.jsonl", 0, 5),), (9,))
    assert unit.identity({}) == {
        "task": {"file": "a.jsonl", "start": 0, "stop": 5},
        "input_bytes": 9,
        "options": {},
    }
