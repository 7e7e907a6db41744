"""RUN/status.json says why a run ended, whoever ended it."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.files.errors import DataError
from megatron_patch.data.segments import Segments
from megatron_patch.run.status_file import StatusFile
from megatron_patch.train import loop
from megatron_patch.train.checkpoint import save
from megatron_patch.train.checkpoint.format import StoredFile
from tests.train.job import Job, run_settings


def status_of(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def test_the_first_rank_to_fail_is_the_cause(tmp_path: Path) -> None:
    first, third = StatusFile(tmp_path, 0), StatusFile(tmp_path, 3)
    first.start(total_steps=9)
    assert status_of(tmp_path)["state"] == "starting"
    first.resumed(step=0)
    assert (status_of(tmp_path)["state"], status_of(tmp_path)["step"]) == ("starting", 0)
    first.progress(step=1, loss=2.0)  # slurm/launch.sh asks the file whether a step was done
    assert (status_of(tmp_path)["state"], status_of(tmp_path)["step"]) == ("running", 1)
    first.progress(step=4, loss=1.5)  # not written: the one before was a moment ago
    third.fail("it broke")
    first.fail("connection closed by peer")
    said = status_of(tmp_path)
    assert (said["state"], said["reason"], said["rank"], said["total_steps"]) == ("failed", "it broke", 3, 9)
    assert (said["step"], said["loss"]) == (4, 1.5), "whoever fails first, the first rank knows how far it came"
    first.start(total_steps=9)
    assert (status_of(tmp_path)["state"], status_of(tmp_path)["reason"]) == ("starting", None)


def test_an_end_that_all_agree_on_stands(tmp_path: Path) -> None:
    status = StatusFile(tmp_path, 0)
    status.start()
    status.checkpoint("step_00000004", 4, 1.0)
    status.end("stopped", "SIGTERM on 1 of 4 ranks", step=4)
    status.fail("torn down")
    said = status_of(tmp_path)
    assert (said["state"], said["step"], said["checkpoint"]["name"]) == ("stopped", 4, "step_00000004")


def test_an_attempt_does_not_begin_on_a_full_disk(tmp_path: Path) -> None:
    status = StatusFile(tmp_path, 0)
    (tmp_path / f".status.json.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"status.json: cannot write: No space left on device\n  remedy: free space"):
        status.start(total_steps=9)


def test_a_disk_that_is_gone_costs_the_word_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    status = StatusFile(run, 0)
    status.start()
    run.rename(tmp_path / "elsewhere")
    run.touch()
    status.end("stopped", "SIGTERM")
    assert f"{run / 'status.json'}: cannot be written" in capsys.readouterr().err
    # At the start it must be there: the word of the attempt before would stand.
    with pytest.raises(OSError):
        status.start()


def test_refused_input_is_a_reason_but_never_undoes_a_completed_run(data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = run_settings(data_folder, run, "run.steps=2", "data.held_out_interval=0")
    wrong = [*settings, "data.folder=nowhere"]
    assert Job(4, wrong, tmp_path / "log").wait() == [2] * 4
    assert status_of(run)["state"] == "failed"
    assert "refused: nowhere/manifest.json: no such file" in status_of(run)["reason"]
    Job(4, settings, tmp_path / "log").run()
    assert Job(4, wrong, tmp_path / "log").wait() == [2] * 4
    assert (status_of(run)["state"], status_of(run)["reason"]) == ("completed", "all 2 steps are done")


def test_an_error_of_any_rank_is_the_reason(data_folder: Path, tmp_path: Path) -> None:
    def before(rank: int) -> None:
        if rank == 2:
            from megatron_patch.train.step import Trainer

            def compute(*_: object) -> None:
                raise RuntimeError("the third rank is unwell")

            Trainer.compute = compute  # type: ignore[method-assign,assignment]

    run = tmp_path / "run"
    assert any(Job(4, run_settings(data_folder, run), tmp_path / "log", before).wait())
    said = status_of(run)
    assert (said["state"], said["reason"], said["rank"]) == ("failed", "RuntimeError: the third rank is unwell", 2)
    output = (tmp_path / "log").read_text()
    assert output.count("Traceback") == 1, "one rank is unwell, the others only lose it"
    assert output.count(f"stopped: another rank is gone; why is above or in {run / 'status.json'}") == 1


def test_a_loader_that_ends_well_does_not_end_its_rank_well(data_folder: Path, tmp_path: Path) -> None:
    def before(rank: int) -> None:
        real, reads = Segments.read, iter(range(10**6))

        def read(self: Segments, segment: int, rows: np.ndarray) -> np.ndarray:
            if rank == 1 and next(reads) == 5:
                sys.exit(0)
            return real(self, segment, rows)

        Segments.read = read  # type: ignore[method-assign]

    run = tmp_path / "run"
    settings = run_settings(data_folder, run, "parallel.tensor=1", "parallel.pipeline=1")
    assert Job(2, settings, tmp_path / "log", before).wait()[1] == 1
    assert (status_of(run)["state"], status_of(run)["reason"], status_of(run)["rank"]) == ("failed", "SystemExit: 0", 1)
    assert "stopped on rank 1: something called sys.exit(0)" in (tmp_path / "log").read_text()


DIED = "a rank died during this save"


@pytest.mark.parametrize(
    ("end", "code", "told"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL, DIED),
        (lambda: os._exit(0), 0, DIED),
        (lambda: sys.exit(0), 1, "SystemExit: 0"),
    ],
    ids=["killed", "exit 0", "sys.exit in the writing thread"],
)
def test_a_rank_that_ends_during_anothers_save_is_reported_as_that(
    data_folder: Path, tmp_path: Path, end: Callable[[], None], code: int, told: str
) -> None:
    def before(rank: int) -> None:
        real = save.write_file

        def write_file(path: Path, tensors: dict[str, torch.Tensor]) -> StoredFile:
            if rank == 1 and "step_" in str(path):
                end()
            return real(path, tensors)

        save.write_file = write_file  # type: ignore[assignment]

    run = tmp_path / "run"
    settings = run_settings(data_folder, run, "parallel.tensor=1", "parallel.pipeline=1", "run.steps=3")
    codes = Job(2, settings, tmp_path / "log", before).wait()
    assert codes[1] == code and any(codes), codes
    reason = status_of(run)["reason"]
    assert f"step_00000003: not written: {told}" in reason and ("traceback" in reason) == (told != DIED), reason
    assert ("Traceback" in (tmp_path / "log").read_text()) == (told != DIED)


def test_a_node_without_the_data_says_so(data_folder: Path, tmp_path: Path) -> None:
    def before(rank: int) -> None:
        os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
        if rank >= 2:  # the second node

            def open_data(*_: object) -> None:
                raise DataError("no such file", file="data/manifest.json", remedy="mount it")

            loop._open_data = open_data  # type: ignore[assignment]

    run = tmp_path / "run"
    assert any(Job(4, run_settings(data_folder, run), tmp_path / "log", before).wait())
    output = (tmp_path / "log").read_text()
    assert output.count(f"refused on {platform.node()}: data/manifest.json: no such file") == 1
    assert "Traceback" not in output
