"""Steps that went wrong and ranks that stand still, with what the recipe says about them."""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_patch.recipe import load
from megatron_patch.run.status import Standing
from megatron_patch.train import last_resort
from megatron_patch.train.hang import EXIT_CODE
from megatron_patch.train.step import Trainer
from megatron_patch.train.watchdog import LossWatch, SlowWatch
from tests.toy import TOY
from tests.train.checkpoint.compare import history, newest
from tests.train.job import Job, run_settings


def policy(**changes: object):
    return load("recipes/demo.yaml", TOY).watchdog.model_copy(
        update={"spike_window": 8, "spike_zscore": 4.0, **changes}
    )


def noisy(count: int) -> list[float]:
    return [3.0 + 0.1 * math.sin(i) for i in range(count)]


def judged(watch: LossWatch, loss: float, norm: float = 1.0) -> str:
    """The action after a step, which the device withholds where it must (train/step.py)."""
    ceiling = watch.ceiling
    high = ceiling is not None and loss - ceiling.mean > ceiling.margin
    watch.judge(loss, norm, math.isfinite(loss) and math.isfinite(norm) and not high)
    return watch.action


def test_a_spike_is_found_once_the_window_is_full() -> None:
    watch = LossWatch(policy(spike="skip"))
    for loss in noisy(8):
        assert watch.ceiling is None and judged(watch, loss) == "go on"
    assert judged(watch, 2.0) == "go on", "a fall is no spike"
    watch = LossWatch(policy(spike="skip"), noisy(8))
    assert judged(watch, 4.0) == "skip" and "above the mean" in watch.reason
    assert watch.window == noisy(8), "a loss that was not trained on is not what the next one is compared with"
    assert judged(watch, 3.0) == "go on" and watch.window[-1] == 3.0


@pytest.mark.parametrize(
    ("spike", "withholds", "action"), [("ignore", 0, "go on"), ("log", 0, "log"), ("stop", 1, "stop")]
)
def test_policies_of_a_spike(spike: str, withholds: int, action: str) -> None:
    watch = LossWatch(policy(spike=spike), noisy(8))
    assert (watch.ceiling is not None) == bool(withholds)
    assert judged(watch, 4.0) == action


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)])
def test_what_is_not_finite_is_judged_by_its_policy(loss: float, norm: float) -> None:
    for non_finite in ("stop", "skip"):
        watch = LossWatch(policy(non_finite=non_finite))
        assert judged(watch, loss, norm) == non_finite and watch.window == []


def test_a_lasting_shift_is_learnt() -> None:
    """What the data are from some row on becomes what the next losses are compared with; one wild batch does not."""
    watch = LossWatch(policy(spike="skip", skip_limit=5), noisy(8))
    shifted = [7.0 + 0.1 * math.sin(i) for i in range(20)]
    assert [judged(watch, loss) for loss in shifted] == ["skip"] * 5 + ["go on"] * 15
    assert watch.withheld == 5 and watch.window == shifted[-8:] and watch.in_a_row == []
    assert judged(watch, 11.0) == "skip", "above the new level too"
    assert judged(watch, 7.0) == "go on" and watch.in_a_row == [], "one that is trained on begins a new count"


@pytest.mark.parametrize(
    "losses",
    [[7.0, 8.0, 12.0, 30.0, 9.0], [7.0, 7.0, math.nan, 7.0, 7.0], [math.inf] * 5, [4.0, 5.0, 6.0, 7.0, 8.0]],
    ids=["wild", "one not finite", "not finite", "rising"],
)
def test_skipping_has_an_end(losses: list[float]) -> None:
    watch = LossWatch(policy(spike="skip", non_finite="skip", skip_limit=5), noisy(8))
    assert [judged(watch, loss) for loss in losses[:3]] == ["skip"] * 3
    resumed = LossWatch(policy(spike="skip", non_finite="skip", skip_limit=5), watch.window, watch.in_a_row, 3)
    assert [judged(resumed, loss) for loss in losses[3:]] == ["skip", "stop"], "a resume does not begin a new count"
    assert "5 updates in a row were withheld (watchdog.skip_limit)" in resumed.reason and resumed.withheld == 5


def test_one_loss_is_no_lasting_shift() -> None:
    """With a limit of one it would be compared with itself, and the window forgotten for a single wild batch."""
    watch = LossWatch(policy(spike="skip", skip_limit=1), noisy(8))
    assert judged(watch, 7.0) == "stop" and watch.at_limit and watch.window == noisy(8)
    assert watch.reason.endswith("; an update was withheld (watchdog.skip_limit)")
    watch = LossWatch(policy(spike="stop", skip_limit=1), noisy(8))
    assert judged(watch, 7.0) == "stop" and not watch.at_limit


def test_a_slow_step_is_measured_against_the_median() -> None:
    watch = SlowWatch(3)
    assert [watch.check(1.0) for _ in range(20)] == [None] * 20
    assert "3.5 times the median of 1.00 s" in str(watch.check(3.5))
    assert watch.check(2.9) is None
    assert SlowWatch(0).check(1e9) is None
    young = SlowWatch(3)
    assert [young.check(seconds) for seconds in (*[1.0] * 15, 9.0)] == [None] * 16, "too few steps to say"
    assert young.check(9.0) is not None


def poison(*steps: int) -> Callable[[int], None]:
    """The gradients of these 1-based steps are NaN on rank 1."""

    def before(rank: int) -> None:
        calls = iter(range(1, 10**6))
        real = Trainer._run

        def run(self: Trainer, shard, tokens: int, forward_only: bool):
            answer = real(self, shard, tokens, forward_only)
            if not forward_only and next(calls) in steps and rank == 1:
                self.optimizer.buffers[0].flat.fill_(math.nan)
            return answer

        Trainer._run = run

    return before


def settings(data_folder: Path, run: Path, *overrides: str) -> list[str]:
    """Two data-parallel ranks, twelve steps."""
    alone = ["parallel.tensor=1", "parallel.pipeline=1", "run.steps=12", "data.held_out_interval=0"]
    return run_settings(data_folder, run, *alone, "checkpoint.interval_steps=100", *overrides)


def test_stop_leaves_the_step_before_and_names_the_rows(data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = Job(2, settings(data_folder, run), tmp_path / "log", poison(6))
    assert job.wait() == [1, 1]
    status = json.loads((run / "status.json").read_text())
    assert (
        status["state"] == "failed" and "step 6: loss" in status["reason"] and "segment 0, rows [" in status["reason"]
    )
    assert newest(run).step == 5
    said = Job(2, settings(data_folder, run, "watchdog.non_finite=skip"), tmp_path / "log", poison(1)).run()
    assert "resuming from" in said
    assert newest(run).state.optimizer_step == 11 and newest(run).step == 12 and newest(run).samples == 96


def test_skip_goes_on_and_records_the_rows(data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    Job(2, settings(data_folder, run, "watchdog.non_finite=skip"), tmp_path / "log", poison(3, 7)).run()
    with newest(run) as checkpoint:
        assert (checkpoint.step, checkpoint.samples, checkpoint.state.optimizer_step) == (12, 96, 10)
    reason = json.loads((run / "status.json").read_text())["reason"]
    assert reason == "all 12 steps are done; 2 of their updates were withheld"
    with newest(run) as checkpoint:
        assert all(checkpoint.tensor(name).isfinite().all() for name in checkpoint.names())
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    found = [(r["step"], r["watchdog"]) for r in records if "watchdog" in r]
    assert [step for step, _ in found] == [3, 7]
    assert all(not f["applied"] and f["segment"] == 0 and len(f["rows"]) == 8 for _, f in found)
    assert len(history(run)) == 12


def test_skipping_ends_and_a_run_that_withheld_most_updates_is_not_completed(data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    skip = ["watchdog.non_finite=skip", "watchdog.skip_limit=3"]
    assert 1 in Job(2, settings(data_folder, run, *skip), tmp_path / "log", poison(4, 5, 6)).wait()
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["withheld"]) == ("failed", 5, 2)
    for said in (
        "step 6: loss ",
        "3 updates in a row were withheld",
        "segment 0, rows [",
        "raise watchdog.skip_limit",
    ):
        assert said in status["reason"]
    assert (newest(run).step, newest(run).state.optimizer_step, newest(run).state.withheld) == (5, 3, [None, None])
    # The count goes on where the checkpoint says: the first step after it is the third.
    assert 1 in Job(2, settings(data_folder, run, *skip), tmp_path / "log", poison(1)).wait()
    assert newest(run).step == 5
    job = Job(2, settings(data_folder, run, *skip[:1]), tmp_path / "log", poison(1, 2, 4, 5, 6))
    assert 1 in job.wait()
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["withheld"]) == ("failed", 12, 7)
    assert "all 12 steps are done, but 7 of their updates were withheld" in status["reason"]
    assert "withheld     7 updates" in "\n".join(Standing.of(run).lines())
    found = [r["watchdog"] for r in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "watchdog" in r]
    assert [record["withheld"] for record in found] == list(range(1, 8))
    assert newest(run).step == 12


def test_a_limit_of_one_is_not_told_to_skip(data_folder: Path, tmp_path: Path) -> None:
    skip = ["watchdog.non_finite=skip", "watchdog.skip_limit=1"]
    assert 1 in Job(2, settings(data_folder, tmp_path / "run", *skip), tmp_path / "log", poison(3)).wait()
    reason = json.loads((tmp_path / "run/status.json").read_text())["reason"]
    assert "an update was withheld (watchdog.skip_limit)" in reason and "raise watchdog.skip_limit" in reason
    assert "non_finite=skip" not in reason


def test_the_window_goes_on_after_a_resume(data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    watch = ["watchdog.spike=skip", "watchdog.spike_window=8", "optimizer.decay_steps=12"]
    Job(2, settings(data_folder, run, *watch, "run.steps=9"), tmp_path / "log").run()
    losses = [loss for _, loss, _ in history(run).values()]
    assert newest(run).state.spike_window == losses[-8:]
    Job(2, settings(data_folder, run, *watch), tmp_path / "log").run()
    losses = [loss for _, loss, _ in history(run).values()]
    assert newest(run).state.spike_window == losses[-8:]


def test_a_slow_rank_is_named(data_folder: Path, tmp_path: Path) -> None:
    def before(rank: int) -> None:
        calls = iter(range(1, 10**6))
        real = Trainer._run

        def run(self: Trainer, *args, **kwargs):
            if rank == 1 and next(calls) == 25:
                time.sleep(1.0)
            return real(self, *args, **kwargs)

        Trainer._run = run

    run = tmp_path / "run"
    said = Job(2, settings(data_folder, run, "run.steps=30", "watchdog.slow_factor=8"), tmp_path / "log", before).run()
    named = [line for line in said.splitlines() if "times the median" in line and line.startswith("step 25:")]
    assert len(named) == 1 and "rank 1 on " in named[0]


def stands_still(rank: int) -> None:
    """Rank 1 never comes back from its fourth step's forward pass."""
    if rank == 1:
        calls = iter(range(1, 10**6))
        real = Trainer._run

        def run(self: Trainer, *args, **kwargs):
            if next(calls) == 4:
                self.optimizer.gather()  # what rank 0 waits for is not the step before
                wait_for_ever()
            return real(self, *args, **kwargs)

        Trainer._run = run


def wait_for_ever() -> None:
    while True:
        time.sleep(1)


def is_stopped(rank: int) -> None:
    """Rank 1's whole process is stopped in its fourth step: no thread of it can say anything."""
    if rank == 1:
        calls = iter(range(1, 10**6))
        real = Trainer._run

        def run(self: Trainer, *args, **kwargs):
            if next(calls) == 4:
                self.optimizer.gather()
                os.kill(os.getpid(), signal.SIGSTOP)
            return real(self, *args, **kwargs)

        Trainer._run = run


@pytest.mark.parametrize("plant", [stands_still, is_stopped], ids=lambda plant: plant.__name__)
def test_a_hang_ends_the_job_with_every_stack(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[int], None]
) -> None:
    monkeypatch.setattr("megatron_patch.train.hang._GRACE", 2.0)
    run = tmp_path / "run"
    overrides = settings(data_folder, run, "watchdog.hang_minutes=0.05", "run.steps=12")
    job = Job(2, overrides, tmp_path / "log", plant)
    started = time.monotonic()
    codes = job.wait()
    assert EXIT_CODE in codes
    assert time.monotonic() - started < 40
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and "hang: no progress for 3 s in step 4" in status["reason"]
    waiting = (run / "stacks/rank_00000.txt").read_text()
    assert waiting.startswith("rank 0 on ") and "step 4" in waiting.splitlines()[0]
    assert "gradients.py" in waiting, "rank 0 waits in the reduction of gradients"
    collectives = json.loads((run / "stacks/rank_00000.collectives.json").read_text())
    assert any("reduce" in entry["profiling_name"] for entry in collectives["entries"])
    if plant is stands_still:
        assert "wait_for_ever" in (run / "stacks/rank_00001.txt").read_text()
    else:
        assert "none from ranks [1]" in status["reason"]


def holds_the_lock(rank: int) -> None:
    """The fourth step blocks in C code that keeps the interpreter's lock, so that no Python thread runs."""
    calls = iter(range(1, 10**6))
    real = Trainer._run

    def run(self: Trainer, *args, **kwargs):
        if next(calls) == 4:
            ctypes.PyDLL(None).sleep(1000)
        return real(self, *args, **kwargs)

    Trainer._run = run


def test_a_rank_that_holds_the_interpreters_lock_is_seen_too(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_patch.train.hang._GRACE", 1.0)
    run = tmp_path / "run"
    job = Job(1, settings(data_folder, run, "watchdog.hang_minutes=0.05"), tmp_path / "log", holds_the_lock)
    assert job.wait(60) == [-signal.SIGKILL]
    assert "test_watchdog.py" in (run / "stacks/rank_00000.locked.txt").read_text()
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["rank"]) == ("failed", 0)
    assert re.match(r"hang: the interpreter stood still for [56] s in step 4; stacks are in ", status["reason"])
    assert f"stopped: rank 0 on {platform.node()}: hang: the interpreter" in job.log.read_text()


def test_time_in_which_a_process_did_not_run_has_not_been_lived() -> None:
    lived = last_resort.Lived(2.0, 100.0)
    for now in (101.0, 102.5, 3700.0, 3701.0):  # an hour asleep
        lived.tick(now)
    assert lived.seconds == 1.0 + 1.5 + 2.0 + 1.0
    lived.tick(3702.0, counts=False)
    lived.tick(3703.0)
    assert lived.seconds == 6.5


def test_a_job_that_was_stopped_and_goes_on_has_not_hung(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP to every rank for longer than both watches wait, as a debugger or a paused machine does; then SIGCONT."""
    monkeypatch.setattr("megatron_patch.train.hang._GRACE", 0.1)
    run = tmp_path / "run"

    def before(rank: int) -> None:
        calls, real = iter(range(1, 10**6)), Trainer.compute

        def compute(self: Trainer, *args):
            if next(calls) == 4:
                (tmp_path / f"rank_{rank}").touch()
                while not (tmp_path / "go").exists():
                    time.sleep(0.01)
            return real(self, *args)

        Trainer.compute = compute

    job = Job(2, settings(data_folder, run, "watchdog.hang_minutes=0.05"), tmp_path / "log", before)
    job.wait_for(lambda: all((tmp_path / f"rank_{rank}").exists() for rank in range(2)))
    time.sleep(0.5)  # the watches have looked since the last beat
    job.signal(signal.SIGSTOP)
    job.wait_for(lambda: all(last_resort.is_stopped(rank.pid) for rank in job.ranks))  # type: ignore[arg-type]
    time.sleep(4.0)  # 3 s are a hang; the last resort waits 3.2
    job.signal(signal.SIGCONT)
    time.sleep(0.5)  # and look again
    (tmp_path / "go").touch()
    job.run()
    assert json.loads((run / "status.json").read_text())["state"] == "completed"
    assert not list((run / "stacks").iterdir()) and len(history(run)) == 12
