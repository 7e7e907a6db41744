"""Milestones that an end owes, and what could take the place of one: another run, a marker lost twice, a link."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from megatron_patch.evaluate.models import checkpoints_in
from megatron_patch.recipe import load
from megatron_patch.train.checkpoint import open_checkpoint
from megatron_patch.train.checkpoint.format import MARKER_NAME, read_marker
from megatron_patch.train.checkpoint.run_folder import RunFolder
from tests.train.job import Job


def settings(data_folder: Path, run: Path, *overrides: str) -> list[str]:
    """Ten steps of 8 rows, restart checkpoints every 4 steps and no milestone."""
    alone = ["batch.micro_batch_size=8", "optimizer.decay_steps=60", "data.held_out_interval=0"]
    cadence = ["checkpoint.interval_steps=4", "checkpoint.milestone_steps=0", "run.steps=10"]
    return [f"data.folder={data_folder}", f"run.folder={run}", *alone, *cadence, *overrides]


@pytest.fixture(scope="module")
def finished(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    Job(1, settings(data_folder, run), run.with_suffix(".log")).run()
    return run


def table(run: Path) -> list[tuple[str, str]]:
    with (run / "checkpoints/checkpoints.csv").open(newline="") as stream:
        return [(row["name"], row["step"]) for row in csv.DictReader(stream)]


@pytest.mark.parametrize(
    ("overrides", "milestone", "word"),
    [
        (["checkpoint.milestone_steps=5"], "ckpt_001", "all 10 steps are done"),
        (["checkpoint.milestone_steps=4"], "ckpt_step_00000010", "all 10 steps are done"),
        (
            ["checkpoint.milestone_steps=4", "run.steps=7"],
            "ckpt_step_00000010",
            "all 7 steps are done; the run stands at step 10",
        ),
    ],
)
def test_an_end_that_has_no_milestone_yet_gets_it_whatever_its_number(
    overrides: list[str], milestone: str, word: str, finished: Path, data_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for _ in range(2):
        Job(1, settings(data_folder, run, *overrides), tmp_path / "log").run()
        assert table(run) == [(milestone, "10")]
        assert [folder.name for folder in checkpoints_in(run)] == [milestone]
        assert json.loads((run / "status.json").read_text())["reason"] == word
    # Its marker is lost: what is set aside is no milestone of the end.
    (run / "checkpoints" / milestone / MARKER_NAME).unlink()
    Job(1, settings(data_folder, run, *overrides), tmp_path / "log").run()
    with open_checkpoint(run / "checkpoints" / milestone) as again:
        assert again.step == 10
    assert (run / f"checkpoints/{milestone}.broken").is_dir()


def test_step_0_of_another_run_is_refused_beside_milestones(data_folder: Path, tmp_path: Path) -> None:
    """Whose restart checkpoints are gone: a run of another batch would give its milestones their names."""
    run = tmp_path / "run"
    every_5 = settings(data_folder, run, "checkpoint.milestone_steps=5")
    Job(1, every_5, tmp_path / "log").run()
    before = table(run), {name: read_marker(run / "checkpoints" / name).digest for name, _ in table(run)}
    for folder in (run / "checkpoints").glob("step_*"):
        shutil.rmtree(folder)
    for change, word in (("batch.global_batch_size=16", "global_batch_size was 8, now it is 16"), ("seed=5", "seed: ")):
        job = Job(1, [*every_5, change], tmp_path / "log", accept_changes=True)
        assert job.wait() == [2]
        assert re.search(
            rf"ckpt_001: is a milestone of a run that was trained otherwise.*{word}", job.log.read_text(), re.S
        )
    said = Job(1, every_5, tmp_path / "log").run()
    assert "no checkpoint to go on from is left beside the milestones" in said
    assert (table(run), {name: read_marker(run / "checkpoints" / name).digest for name, _ in table(run)}) == before
    assert not list((run / "checkpoints").glob("*.earlier"))


def test_what_is_set_aside_of_a_milestone_stays(tmp_path: Path) -> None:
    runs = RunFolder(load("recipes/demo.yaml", [f"run.folder={tmp_path}"]))
    for number in range(3):
        (runs.milestone(1)).mkdir(parents=True)
        (runs.milestone(1) / str(number)).touch()
        runs.set_aside(runs.milestone(1))
    assert [p.relative_to(runs.path).as_posix() for p in sorted(runs.path.rglob("*")) if p.is_file()] == [
        "ckpt_001.broken/0",
        "ckpt_001.broken_2/1",
        "ckpt_001.broken_3/2",
    ]


def test_a_link_to_a_milestone_that_is_out_of_reach_stays(finished: Path, tmp_path: Path) -> None:
    runs = RunFolder(load("recipes/demo.yaml", [f"run.folder={tmp_path}"]))
    runs.path.mkdir()
    runs.milestone(0).symlink_to("/not/mounted/ckpt_000")
    marker = read_marker(next((finished / "checkpoints").glob("step_*")))
    runs.keep_earlier(runs.milestone(0), marker)
    assert [(p.name, str(p.readlink())) for p in runs.path.iterdir()] == [("ckpt_000.earlier", "/not/mounted/ckpt_000")]
