"""SIGTERM and SIGUSR1, to one rank or to all, in every phase: all ranks stop together with a durable checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_patch.train import loop, signals
from megatron_patch.train.checkpoint import save
from megatron_patch.train.signals import Requests
from megatron_patch.train.step import Trainer
from tests.train.checkpoint.compare import assert_bit_equal, history, newest
from tests.train.job import RANKS, Job, run_settings

Plant = Callable[[Callable[[], None]], None]


def at_start_up(send: Callable[[], None]) -> None:
    send()


def in_warm_up(send: Callable[[], None]) -> None:
    real = Trainer.update

    def update(self: Trainer, learning_rate: float, *args):
        if learning_rate > 0:  # the second step: LR(0) is 0, the warm-up has three
            send()
        return real(self, learning_rate, *args)

    Trainer.update = update


def in_resume(send: Callable[[], None]) -> None:
    real = loop.Keeper.resume

    def resume(self, *args):
        send()
        return real(self, *args)

    loop.Keeper.resume = resume


def in_evaluation(send: Callable[[], None]) -> None:
    real = Trainer._run

    def run(self: Trainer, shard, tokens: int, forward_only: bool):
        answer = real(self, shard, tokens, forward_only)
        if forward_only:
            send()
        return answer

    Trainer._run = run


def in_a_save(send: Callable[[], None]) -> None:
    real = save.write_file

    def write_file(path, tensors):
        send()
        stored = real(path, tensors)
        send()  # a second signal does no harm
        return stored

    save.write_file = write_file


PHASES = [at_start_up, in_resume, in_warm_up, in_evaluation, in_a_save]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
@pytest.mark.parametrize("victims", [[2], list(range(RANKS))], ids=["one rank", "all ranks"])
@pytest.mark.parametrize("plant", PHASES, ids=lambda phase: phase.__name__)
def test_it_stops_with_a_durable_checkpoint(
    data_folder: Path, undisturbed: Path, tmp_path: Path, plant: Plant, victims: list[int], number: signal.Signals
) -> None:
    run = tmp_path / "run"
    settings = run_settings(data_folder, run, "data.held_out_interval=5")

    def before(rank: int) -> None:
        if rank in victims:
            plant(lambda: os.kill(os.getpid(), number))

    Job(RANKS, settings, tmp_path / "log", before).run()
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    name = "SIGUSR1" if number == signal.SIGUSR1 else "SIGTERM or Ctrl-C"
    asked = re.match(rf"{name} on (\d) of {RANKS} ranks", status["reason"])
    assert asked is not None
    # Writing threads signal when they please, so one rank may be a step ahead of another.
    assert int(asked[1]) == len(victims) or (plant is in_a_save and int(asked[1]) < len(victims))
    with newest(run) as checkpoint:
        assert checkpoint.step == status["step"] == len(history(run)) < 10
    if plant in (in_evaluation, in_a_save) and number == signal.SIGUSR1 and len(victims) == 1:
        Job(RANKS, run_settings(data_folder, run), tmp_path / "log").run()
        assert_bit_equal(newest(run), newest(undisturbed))
        assert history(run) == history(undisturbed)


def test_a_signal_from_outside_while_it_trains(data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = Job(RANKS, run_settings(data_folder, run), tmp_path / "log")
    job.wait_for(lambda: (run / "log.jsonl").exists() and "step" in (run / "log.jsonl").read_text())
    for _ in range(3):
        job.signal(signal.SIGTERM, [1])
    job.run()
    assert "SIGTERM or Ctrl-C on 1 of 4 ranks" in json.loads((run / "status.json").read_text())["reason"]
    assert newest(run).step == len(history(run))


def test_a_terminal_that_is_gone_costs_its_lines_and_leaves_a_checkpoint(data_folder: Path, tmp_path: Path) -> None:
    """As when an ssh session drops: SIGHUP to every rank, and what they print fails from then on."""
    run = tmp_path / "run"
    ours, theirs = pty.openpty()

    def before(rank: int) -> None:
        os.close(ours)
        sys.stdout = sys.stderr = os.fdopen(theirs, "w", buffering=1)

    job = Job(RANKS, run_settings(data_folder, run), tmp_path / "log", before)
    os.close(theirs)
    threading.Thread(target=drain, args=(ours,), daemon=True).start()
    job.wait_for(lambda: (run / "log.jsonl").exists() and "step" in (run / "log.jsonl").read_text())
    os.close(ours)
    job.signal(signal.SIGHUP)
    job.run()
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped" and re.match(rf"SIGHUP on [1-{RANKS}] of {RANKS} ranks", status["reason"])
    assert newest(run).step == status["step"] == len(history(run))


def drain(terminal: int) -> None:
    """What is printed is read, or the ranks would wait; until the terminal is closed."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 65536):
            pass


def test_what_nohup_ignores_stays_ignored() -> None:
    script = "import signal; from megatron_patch.train import signals; signals.hold(); print(int(signal.getsignal(1)))"
    hold = subprocess.run(["nohup", sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert hold.stdout.split() == ["1"], "SIG_IGN"


def test_ctrl_c_saves_although_torchrun_repeats_it(data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = Job(RANKS, run_settings(data_folder, run), tmp_path / "log")
    job.wait_for(lambda: (run / "log.jsonl").exists() and "step" in (run / "log.jsonl").read_text())
    for _ in range(2):
        job.signal(signal.SIGINT)
    said = job.run()
    assert said.count("Ctrl-C: a checkpoint is saved after the step under way") == 1
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped"
    # Ranks learn of it one after the other, some of them from the first.
    assert re.match(rf"SIGTERM or Ctrl-C on [1-{RANKS}] of {RANKS} ranks", status["reason"])
    assert newest(run).step == status["step"] == len(history(run))


def test_a_second_ctrl_c_ends_at_once(data_folder: Path, tmp_path: Path) -> None:
    def before(rank: int) -> None:
        signals._ECHO = 0.0  # the second one comes as soon as the first was answered

        def stuck(*_: object) -> None:
            (tmp_path / "stuck").touch()
            threading.Event().wait()

        Trainer.compute = stuck  # type: ignore[method-assign,assignment]

    alone = ["parallel.tensor=1", "parallel.pipeline=1"]
    job = Job(1, run_settings(data_folder, tmp_path / "run", *alone), tmp_path / "log", before)
    job.wait_for((tmp_path / "stuck").exists)
    job.signal(signal.SIGINT)
    job.wait_for(lambda: "Ctrl-C again ends at once" in job.log.read_text())
    job.signal(signal.SIGINT)
    assert any(job.wait(timeout=30))
    assert json.loads((tmp_path / "run/status.json").read_text())["reason"].startswith("KeyboardInterrupt")


def test_the_wall_time_budget_stops_a_run(data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = time.monotonic()
    # The clock runs from the import of the module, which the test process did long ago.
    Job(RANKS, run_settings(data_folder, run, "run.wall_minutes=0.001"), tmp_path / "log").run()
    assert time.monotonic() - started < 60
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("stopped", 1)
    assert "run.wall_minutes 0.001 used up" in status["reason"]
    assert newest(run).step == 1


def test_the_clock_asks_for_restart_checkpoints(data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    clock = [
        "checkpoint.interval_steps=0",
        "checkpoint.interval_minutes=0.005",
        "run.steps=30",
        "checkpoint.keep=99",
    ]
    Job(RANKS, run_settings(data_folder, run, *clock), tmp_path / "log").run()
    points = sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step_*"))
    assert len(points) > 2 and points[-1] == 30
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    times = {record["step"]: record["time"] for record in records}
    for earlier, later in itertools.pairwise(points[:-1]):
        assert times[later] - times[earlier] >= 0.3


@pytest.mark.parametrize("world_size", [1, 4, 160, 2047])
def test_the_sum_of_requests_says_who_asked(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    quiet = Requests(1, world_size, 0, 0)
    due = Requests(0, world_size, 1e-9, 1e-9)
    monkeypatch.setattr("megatron_patch.train.signals._received", set())
    assert quiet.decide(quiet.number() * world_size) == quiet.decide(0)
    assert quiet.decide(0).stop is None and not quiet.decide(0).save
    assert due.decide(due.number()).save and "wall_minutes" in str(due.decide(due.number()).stop)
    monkeypatch.setattr("megatron_patch.train.signals._received", {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
    total = due.number() + quiet.number() * (world_size - 1)
    assert total < 2**24, "fp32 adds up exactly below"
    decision = due.decide(total)
    assert decision.save
    for name in ("SIGTERM or Ctrl-C", "SIGUSR1"):
        assert f"{name} on {world_size} of {world_size} ranks" in str(decision.stop)


def test_a_signal_may_come_while_others_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(dict[int, int]):
        def __getitem__(self, number: int) -> int:
            signals._remember(signal.SIGTERM, None)  # as the interpreter would, between any two of its instructions
            return super().__getitem__(number)

    monkeypatch.setattr(signals, "_received", {signal.SIGUSR1})
    monkeypatch.setattr(signals, "_NUMBERS", Interrupted(signals._NUMBERS))
    requests = Requests(1, 4, 0, 0)
    assert requests.decide(requests.number()).stop == "SIGUSR1 on 1 of 4 ranks"
    assert "SIGTERM" in str(requests.decide(requests.number()).stop)


def test_more_ranks_than_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="2048 ranks"):
        Requests(0, 2048, 0, 0)
