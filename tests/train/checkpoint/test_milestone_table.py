"""RUN/checkpoints/checkpoints.csv as an editor, a full disk or somebody's script leaves it."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_patch.recipe import load
from megatron_patch.run.milestones import Milestone, read
from megatron_patch.train.checkpoint.run_folder import RunFolder


def milestone(number: int) -> Milestone:
    return Milestone(f"ckpt_{number:03d}", 10 * number, 80, 80, "0-0", "2026-11-24T00:00:00", "full", "d")


@pytest.fixture
def runs(tmp_path: Path) -> RunFolder:
    """With a table of the milestones 0 and 1."""
    folder = RunFolder(load("recipes/demo.yaml", [f"run.folder={tmp_path}"]))
    folder.path.mkdir()
    folder.record(milestone(0))
    folder.record(milestone(1))
    return folder


def names(folder: RunFolder) -> list[str]:
    with (folder.path / "checkpoints.csv").open() as stream:
        return [row["name"] for row in csv.DictReader(stream)]


@pytest.mark.parametrize(
    "added",
    [
        pytest.param("ckpt_002,x,8\n", id="a line cut short"),
        pytest.param("ckpt_002,20,80,80,0-0,2026-11-24T00:00:00,full,\n", id="without a digest"),
        pytest.param('"' + "x" * 300_000, id="longer than csv reads"),
        pytest.param(f"ckpt_002,{'9' * 5000},80,80,0-0,2026-11-24T00:00:00,full,d\n", id="a step of 5,000 digits"),
        pytest.param("ckpt_001,10,80,80,0-0,2026-11-24T00:00:00,full,d\n", id="a line twice"),
        pytest.param("\udcff\udcfe\n", id="no UTF-8"),
    ],
)
def test_whole_lines_of_a_damaged_table_stay(runs: RunFolder, added: str) -> None:
    table, broken = runs.path / "checkpoints.csv", runs.path / "checkpoints.csv.broken"
    assert not broken.exists()
    damaged = table.read_bytes() + added.encode(errors="surrogateescape")
    table.write_bytes(damaged)
    (said,) = runs.sweep()
    assert said == "checkpoints.csv: damaged, 2 of its lines are whole and stay; set aside as checkpoints.csv.broken"
    assert names(runs) == ["ckpt_000", "ckpt_001"] and broken.read_bytes() == damaged
    assert runs.sweep() == []
    table.write_bytes(damaged)
    runs.record(milestone(3))  # damaged while the run trains
    assert names(runs) == ["ckpt_000", "ckpt_001", "ckpt_003"]


def test_of_lines_that_contradict_each_other_none_is_believed(runs: RunFolder) -> None:
    with (runs.path / "checkpoints.csv").open("a") as table:
        table.write("ckpt_001,25,80,80,0-0,2026-11-24T00:00:00,full,d\n")
    runs.sweep()
    assert names(runs) == ["ckpt_000"]


def put(content: str | bytes) -> Callable[[Path], object]:
    return lambda table: table.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(
    "place",
    [
        put("a,b\n1,2\n"),
        put(""),
        put("name,step\n"),
        put(b"\0" * 4096),
        Path.mkdir,
        os.mkfifo,
        lambda table: table.symlink_to("/proc/self/mem"),  # reading it is an input/output error
        lambda table: table.symlink_to("/dev/zero"),
        lambda table: table.symlink_to("nowhere"),
    ],
    ids=["foreign", "empty", "other columns", "zeros", "folder", "pipe", "unreadable", "endless", "dangling"],
)
def test_what_is_no_table_is_set_aside(runs: RunFolder, place: Callable[[Path], object]) -> None:
    table = runs.path / "checkpoints.csv"
    table.unlink()
    place(table)
    assert read(table) == ([], False)
    assert runs.sweep()[0].startswith("checkpoints.csv: damaged, 0 of its lines")
    assert os.path.lexists(runs.path / "checkpoints.csv.broken") and not os.path.lexists(table)
    place(table)
    runs.record(milestone(4))  # damaged while the run trains; and there is one that was set aside
    assert names(runs) == ["ckpt_004"]


@pytest.mark.parametrize("change", [lambda t: b"\xef\xbb\xbf" + t, lambda t: t.replace(b"\n", b"\r\n"), bytes.strip])
def test_what_editors_do_is_no_damage(runs: RunFolder, change: Callable[[bytes], bytes]) -> None:
    table = runs.path / "checkpoints.csv"
    table.write_bytes(change(table.read_bytes()))
    assert runs.sweep() == [] and len(runs.recorded()) == 2
    runs.record(milestone(2))
    assert names(runs) == ["ckpt_000", "ckpt_001", "ckpt_002"]
