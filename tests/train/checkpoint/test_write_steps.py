"""A rank is killed before each write step of a checkpoint in turn; the run goes on from this one or from the last."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.train.checkpoint import open_checkpoint, write
from megatron_patch.train.checkpoint.run_folder import RunFolder
from tests.train.checkpoint.compare import assert_bit_equal, history, newest
from tests.train.job import Job, write_data_set

BEFORE, NOW, STEPS = 4, 8, 10
RANKS = 2


def settings(data_folder: Path, run: Path, steps: int) -> list[str]:
    return [
        f"data.folder={data_folder}",
        f"run.folder={run}",
        f"run.steps={steps}",
        "batch.micro_batch_size=4",
        "optimizer.decay_steps=20",
        "checkpoint.interval_steps=4",
        "checkpoint.keep=1",
        "checkpoint.milestone_steps=0",
        "data.held_out_interval=0",
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The data set, a run that stands at the checkpoint before, and the whole run undisturbed."""
    root = tmp_path_factory.mktemp("runs")
    data_folder = write_data_set(root / "data")
    for name, steps in (("before", BEFORE), ("undisturbed", STEPS)):
        Job(RANKS, settings(data_folder, root / name, steps), root / "log").run()
    return data_folder, root / "before", root / "undisturbed"


def die_at(step: int, victim: int) -> Callable[[int], None]:
    """Makes rank `victim` kill itself before the `step`-th change to the disk that its writing thread is to make."""

    def plant(rank: int) -> None:
        if rank != victim:
            return
        steps = itertools.count(1)
        for owner, name in (
            (write, "save_file"),
            (os, "fsync"),
            (os, "replace"),
            (shutil, "rmtree"),
            (Path, "mkdir"),
            (Path, "rename"),
            (Path, "unlink"),
        ):
            setattr(owner, name, _deadly(getattr(owner, name), steps, step))

    return plant


def _deadly(real: Callable[..., Any], steps: Any, fatal: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name == "checkpoint" and next(steps) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    return call


def tear(rank: int) -> None:
    """Rank 0 dies with its file half written."""
    if rank == 0:
        real = write.save_file

        def half(tensors: Any, path: Path) -> None:
            real(tensors, path)
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        write.save_file = half


def disturbed(runs: tuple[Path, Path, Path], folder: Path, plant: Callable[[int], None]) -> int | None:
    """The step resumed from after the planted death; None where nobody died."""
    data_folder, before, undisturbed = runs
    run, log = folder / "run", folder / "log"
    shutil.copytree(before, run)
    codes = Job(RANKS, settings(data_folder, run, NOW), log, before=plant).wait()
    if not any(codes):
        return None
    assert -signal.SIGKILL in codes
    durable = (run / "checkpoints" / f"step_{NOW:08d}" / "COMPLETE").exists()
    log.unlink()
    said = Job(RANKS, settings(data_folder, run, STEPS), log).run()
    resumed = int(re.search(r"resuming from .* at step (\d+)", said)[1])  # type: ignore[index]
    assert resumed == (NOW if durable else BEFORE)
    assert_bit_equal(newest(run), newest(undisturbed))
    expected = history(undisturbed)
    assert history(run) == expected
    left = {p.name for p in (run / "checkpoints").iterdir()}
    assert left == {"latest", f"step_{STEPS:08d}"}, "something half-written or superseded was left"
    return resumed


def test_the_first_rank_dies_at_each_step(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    resumed = []
    for step in itertools.count(1):
        answer = disturbed(runs, tmp_path / str(step), die_at(step, victim=0))
        if answer is None:
            break
        resumed.append(answer)
    assert len(resumed) > 15, f"only {len(resumed)} steps were found"
    assert resumed == sorted(resumed), "once durable, always durable"
    assert {BEFORE, NOW} == set(resumed)


def test_another_rank_dies_at_each_step(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for step in itertools.count(1):
        if disturbed(runs, tmp_path / str(step), die_at(step, victim=1)) is None:
            break
    assert step > 3


def test_a_torn_file(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    assert disturbed(runs, tmp_path, tear) == BEFORE


def disk_lies(rank: int) -> None:
    """What rank 1 reads back differs in one bit from what it wrote."""
    if rank == 1:
        real = write.save_file

        def lie(tensors: Any, path: Path) -> None:
            real(tensors, path)
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

        write.save_file = lie


def test_what_fails_after_the_marker_does_not_make_it_unwritten(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    data_folder, before, _ = runs
    run = tmp_path / "run"
    shutil.copytree(before, run)

    def plant(rank: int) -> None:
        def refuse(self: RunFolder) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        RunFolder.retain = refuse  # type: ignore[method-assign,assignment]

    job = Job(RANKS, settings(data_folder, run, NOW), tmp_path / "log", before=plant)
    assert any(job.wait())
    reason = json.loads((run / "status.json").read_text())["reason"]
    assert f"step_{NOW:08d}: durable, but what follows a save failed: rank 0 on " in reason
    open_checkpoint(run / f"checkpoints/step_{NOW:08d}").close()


def disk_is_full(rank: int) -> None:
    if rank == 1:

        def refuse(tensors: Any, path: Path) -> None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        write.save_file = refuse


@pytest.mark.parametrize(
    ("plant", "says"), [(disk_lies, "read back from the disk it is not"), (disk_is_full, "No space left on device")]
)
def test_a_save_that_fails_ends_the_run_and_leaves_the_one_before(
    runs: tuple[Path, Path, Path], tmp_path: Path, plant: Callable[[int], None], says: str
) -> None:
    data_folder, before, _ = runs
    run = tmp_path / "run"
    shutil.copytree(before, run)
    job = Job(RANKS, settings(data_folder, run, NOW), tmp_path / "log", before=plant)
    assert any(job.wait())
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and says in status["reason"] and "rank 1 on " in status["reason"]
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"latest", f"step_{BEFORE:08d}"}
    assert newest(run).step == BEFORE
