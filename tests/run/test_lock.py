"""A run folder has one training at a time, whoever starts the second and however the first ends."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from megatron_patch import recipe
from megatron_patch.run.lock import RunBusy, RunLock
from megatron_patch.run.status import Standing
from megatron_patch.train import loop
from tests.run.test_status_file import status_of
from tests.train.checkpoint.compare import assert_bit_equal, history, newest
from tests.train.job import RANKS, Job, run_settings, write_data_set


def test_a_second_training_is_refused_and_the_first_is_not_disturbed(
    data_folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = Job(RANKS, run_settings(data_folder, run), tmp_path / "first.log")
    first.wait_for(lambda: (run / "checkpoints/latest").exists())
    second = Job(RANKS, run_settings(data_folder, run), tmp_path / "second.log")
    assert second.wait()[0] == 2
    said = second.log.read_text()
    assert f"refused: run.folder {run}: another training runs here: process {first.ranks[0].pid} on" in said
    assert status_of(run)["state"] in ("running", "completed")
    first.run()
    assert status_of(run)["state"] == "completed"
    assert history(run) == history(undisturbed)
    assert_bit_equal(newest(run), newest(undisturbed))


def test_a_killed_training_holds_nothing(data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = Job(1, run_settings(data_folder, run, "parallel.tensor=1", "parallel.pipeline=1"), tmp_path / "log")
    job.wait_for(lambda: (run / "log.jsonl").exists())
    with pytest.raises(RunBusy, match=rf"process {job.ranks[0].pid} on"):
        RunLock(run)
    job.wait_for(lambda: Standing.of(run).state == "running")
    job.kill()
    assert status_of(run)["state"] == "running", "nobody was left to write another word"
    assert Standing.of(run).state == "gone" and "its processes are gone" in "\n".join(Standing.of(run).lines())
    (run / ".lock").write_text("process 1 on another-node, Slurm job 7")
    assert Standing.of(run).state == "running", "of another node's it cannot be said before it has been silent"
    RunLock(run).release()


def test_a_file_system_without_locks_cannot_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    RunLock(tmp_path).release()


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate: 0.0003 -> 0.001"),
        ("parallel.tensor=2", "parallel.tensor: 1 -> 2"),
        ("data.folder={other}", "data set in {other}: "),
        ("data.folder={copy}", None),
    ],
)
def test_a_node_with_another_recipe_or_data_set_is_named(
    data_folder: Path, tmp_path: Path, override: str, shown: str | None
) -> None:
    places = {"other": write_data_set(tmp_path / "other", seed=1), "copy": tmp_path / "copy"}
    shutil.copytree(data_folder, places["copy"])

    def differ(rank: int) -> None:
        if rank == 1:
            load = recipe.load
            loop.recipe.load = lambda path, overrides: load(path, [*overrides, override.format(**places)])  # type: ignore[assignment]

    layout = ["parallel.tensor=1", "parallel.pipeline=1", "run.steps=2", "optimizer.warmup_steps=1"]
    job = Job(2, run_settings(data_folder, tmp_path / "run", *layout), tmp_path / "log", before=differ)
    assert job.wait() == ([0, 0] if shown is None else [2, 2])
    if shown is not None:
        said = job.log.read_text()
        assert said.count("refused: rank 1 on ") == 1 and shown.format(**places) in said
        assert status_of(tmp_path / "run")["reason"].startswith("refused: rank 1 on ")


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_folder_that_cannot_be_written_is_refused(data_folder: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    job = Job(1, run_settings(data_folder, tmp_path / place), tmp_path / "log")
    assert job.wait() == [2]
    assert f"refused: run.folder {tmp_path / place}: cannot be written" in job.log.read_text()


@pytest.mark.parametrize("name", ["log.jsonl", "status.json", "recipe.yaml", "stacks"])
def test_what_lies_in_the_place_of_a_file_is_refused(data_folder: Path, tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    in_the_way, kind = (os.mkfifo, "folder") if name == "stacks" else (os.mkdir, "plain file")
    in_the_way(run / name)
    job = Job(1, run_settings(data_folder, run, "parallel.tensor=1", "parallel.pipeline=1"), tmp_path / "log")
    assert job.wait() == [2]
    assert f"refused: {run / name}: is no {kind}; move it away" in job.log.read_text()
    assert not (run / "checkpoints").exists()
    if name != "status.json":
        assert status_of(run)["reason"].startswith(f"refused: {run / name}")
