"""A run folder has one training at a time, whoever starts the second and however the first ends."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from megatron_patch.run_lock import RunBusy, RunLock
from tests.checkpoint.compare import assert_bit_equal, history, newest
from tests.train.conftest import RANKS, run_settings
from tests.train.job import Job
from tests.train.test_status_file import status_of


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
    job.kill()
    RunLock(run).release()


def test_a_file_system_without_locks_cannot_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    RunLock(tmp_path).release()


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_folder_that_cannot_be_written_is_refused(data_folder: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    job = Job(1, run_settings(data_folder, tmp_path / place), tmp_path / "log")
    assert job.wait() == [2]
    assert f"refused: run.folder {tmp_path / place}: cannot be written" in job.log.read_text()
