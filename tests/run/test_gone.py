"""A run whose folder, lock, log or checkpoints go away saves where it can, stops and says what is gone."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_patch.run import attempts
from megatron_patch.run.lock import RunLock
from megatron_patch.train.checkpoint import save
from megatron_patch.train.checkpoint.format import StoredFile
from megatron_patch.train.step import Step, Trainer
from tests.run.test_status_file import status_of
from tests.train.checkpoint.compare import assert_bit_equal, history, newest
from tests.train.job import Job, run_settings

Harm = Callable[[Path], None]
ALONE = ["parallel.tensor=1", "parallel.pipeline=1", "batch.micro_batch_size=8"]
others: list[RunLock] = []  # of another training, which holds them for as long as this process lives


def delete(run: Path) -> None:
    """As often as it takes: a save under way makes a file where one was deleted."""
    while run.exists():
        shutil.rmtree(run, ignore_errors=True)


def rename(run: Path) -> None:
    run.rename(run.with_name("renamed"))


def replace(run: Path) -> None:
    """Another training begins at the path, in a folder of its own."""
    rename(run)
    others.append(RunLock(run))


def delete_and_make_again(run: Path) -> None:
    delete(run)
    run.mkdir()


def point_elsewhere(run: Path) -> None:
    """The run's folder is a link (`link_first`)."""
    run.unlink()
    run.with_name("other").mkdir()
    run.symlink_to("other")


def delete_log(run: Path) -> None:
    (run / "log.jsonl").unlink()


def rotate_log(run: Path) -> None:
    (run / "log.jsonl").rename(run / "log.jsonl.1")
    (run / "log.jsonl").touch()


def empty_log(run: Path) -> None:
    """As `logrotate` does under `copytruncate`."""
    os.truncate(run / "log.jsonl", 0)


def delete_lock(run: Path) -> None:
    (run / ".lock").unlink()


def replace_lock(run: Path) -> None:
    delete_lock(run)
    (run / ".lock").write_text("no process")


def take(run: Path) -> None:
    """Another training is admitted in the same folder, since nobody saw a lock."""
    delete_lock(run)
    others.append(RunLock(run))


def delete_checkpoints(run: Path) -> None:
    delete(run / "checkpoints")


def at_the_sixth_update(harm: Harm, run: Path) -> Callable[[int], None]:
    def before(rank: int) -> None:
        real, steps = Trainer.update, itertools.count()

        def update(self: Trainer, *args: Any) -> Step:
            if next(steps) == 5 and rank == 0:
                harm(run)
            return real(self, *args)

        Trainer.update = update  # type: ignore[method-assign]

    return before


@pytest.mark.parametrize(
    ("harm", "saved_in", "named"),
    [
        (delete, "run", "run is gone from its path"),
        (rename, "renamed", "run is gone from its path"),
        (replace, "renamed", "run is gone from its path"),
        (delete_and_make_again, "run", "run is gone from its path"),
        (point_elsewhere, "target", "run is gone from its path"),
        (delete_log, "run", "log.jsonl is gone from its path"),
        (rotate_log, "run", "log.jsonl is gone from its path"),
        (empty_log, "run", "log.jsonl was cut from"),
        (delete_lock, "run", ".lock is gone from its path"),
        (replace_lock, "run", ".lock is gone from its path"),
        (delete_checkpoints, "run", "checkpoints is gone from its path"),
        (take, None, ".lock is gone from its path"),
    ],
)
def test_a_run_that_goes_away_saves_where_it_can_and_stops(
    data_folder: Path, tmp_path: Path, harm: Harm, saved_in: str | None, named: str
) -> None:
    run = tmp_path / "run"
    if harm is point_elsewhere:
        (tmp_path / "target").mkdir()
        run.symlink_to("target")
    settings = run_settings(data_folder, run, *ALONE, "checkpoint.milestone_steps=0")
    job = Job(1, settings, tmp_path / "log", at_the_sixth_update(harm, run))
    assert job.wait() == [1]
    said = job.log.read_text()
    assert named in said and "Traceback" not in said
    if saved_in is None:
        assert f"another training runs here: process {job.ranks[0].pid} on" in said
        assert "is not saved: let one training have the folder" in said
        assert status_of(run)["state"] == "running", "the other training's word is not overwritten"
        assert max(history(run)) <= 6, "nothing more is written into its log"
        return
    status = status_of(tmp_path / saved_in)
    assert status["state"] == "failed" and named in status["reason"]
    assert f"whose checkpoint is in {tmp_path / saved_in}/checkpoints" in status["reason"]
    assert newest(tmp_path / saved_in).step == status["step"] < 10
    if harm is replace:
        assert [p.name for p in run.iterdir()] == [".lock"], "nothing is written into the other training's folder"
    if harm is point_elsewhere:
        assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize("harm", [delete, rename])
def test_a_folder_that_goes_away_during_a_save(
    data_folder: Path, undisturbed: Path, tmp_path: Path, harm: Harm
) -> None:
    """What is being saved is saved where the folder went, and a run that goes on from there is as undisturbed."""
    run = tmp_path / "run"
    settings = run_settings(data_folder, run, "checkpoint.milestone_steps=0")

    def before(rank: int) -> None:
        real = save.write_file

        def write_file(path: Path, tensors: dict[str, torch.Tensor]) -> StoredFile:
            stored = real(path, tensors)
            if rank == 0 and "step_00000006" in str(path) and run.exists() and not (tmp_path / "harmed").exists():
                (tmp_path / "harmed").touch()
                harm(run)
            return stored

        save.write_file = write_file  # type: ignore[assignment]

    job = Job(4, settings, tmp_path / "log", before)
    assert set(job.wait()) == {1}, job.log.read_text()
    place = run if harm is delete else tmp_path / "renamed"
    # What is deleted goes one by one: the lock may be missed before its folder is.
    assert re.search(r"/run(/\.lock)? is gone from its path", status_of(place)["reason"]), job.log.read_text()
    kept = sorted(p.name for p in (place / "checkpoints").glob("step_*"))
    assert "step_00000006" in kept and newest(place).step == status_of(place)["step"]
    if harm is rename:
        assert not run.exists(), "no rank makes the folder anew"
        Job(4, run_settings(data_folder, place), tmp_path / "log").run()
        assert history(place) == history(undisturbed)
        assert_bit_equal(newest(place), newest(undisturbed))


def test_without_locks_the_first_training_sees_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first = RunLock(tmp_path)
    assert first.look() == "" and first.holds()
    (tmp_path / ".lock").touch()
    assert first.look() == "" and first.holds(), "a file that somebody touched is still its own"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    second = RunLock(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert "another training runs here" in first.look() and "Slurm job 7" in first.taken and not first.holds()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert second.look() == "" and second.holds()


def test_a_job_whose_folder_is_another_one_now_is_not_put_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text(json.dumps({"state": "running", "updated": 1}))
    before = (run / "status.json").read_bytes()
    for folder in (run, tmp_path / "nowhere"):
        assert attempts.main(["end", str(folder), "--series", "job-1", "--limit", "3"]) == 0
        said = capsys.readouterr()
        assert said.out == "give-up\n" and f"{folder} is no longer the folder in which this attempt began" in said.err
    assert (run / "status.json").read_bytes() == before and not (tmp_path / "nowhere").exists()
