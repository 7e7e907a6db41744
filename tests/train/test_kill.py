"""Killed with -9 at random moments, a run ends as if it had never been disturbed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.toy import TOY
from tests.train.checkpoint.compare import assert_bit_equal, history, newest
from tests.train.job import RANKS, STEPS, Job, run_settings


def last_step(run: Path, since: float = 0.0) -> int:
    """Last step logged after `since`, 0 before the first; a last line may be half written."""
    try:
        lines = (run / "log.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return 0
    records = [json.loads(line) for line in lines]
    return max((record["step"] for record in records if record["time"] > since), default=0)


KILLS, SOAK_KILLS = 6, 10  # of a run; the soak has 20 runs


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 21))])
def test_killed_at_random_moments(data_folder: Path, undisturbed: Path, tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    run, log = tmp_path / "run", tmp_path / "log"
    settings = run_settings(data_folder, run)
    resumed_from = set()
    for kill in range(SOAK_KILLS if seed else KILLS):
        started = time.time()
        job = Job(RANKS, settings, log)
        if kill % 5 == 0:  # somewhere between fork and first step
            time.sleep(dice.uniform(0, 0.7))
        else:
            goal = min(newest(run).step + dice.randint(1, 9) if (run / "checkpoints/latest").exists() else 4, STEPS - 3)
            job.wait_for(lambda goal=goal, started=started: last_step(run, started) >= goal)
            time.sleep(dice.uniform(0, 0.05))
        assert any(p.exitcode is None for p in job.ranks), "the job was over before the kill"
        job.signal(signal.SIGKILL, None if kill % 2 else [dice.randrange(RANKS)])
        assert -signal.SIGKILL in job.wait()
        if (run / "checkpoints/latest").exists():
            resumed_from.add(newest(run).step)
    Job(RANKS, settings, log).run()
    assert len(resumed_from) > 1, "the kills fell on one place only"
    assert_bit_equal(newest(run), newest(undisturbed))
    assert list(history(run)) == list(range(1, STEPS + 1)), "a step is missing from, or twice in, the accepted history"
    assert history(run) == history(undisturbed)
    assert json.loads((run / "status.json").read_text())["state"] == "completed"


LAYOUTS = (  # (ranks, overrides of the run's settings)
    (4, ["parallel.tensor=2", "parallel.pipeline=2", "batch.micro_batch_size=2"]),
    (1, ["parallel.tensor=1", "parallel.pipeline=1", "batch.micro_batch_size=8"]),
    (3, ["parallel.tensor=1", "parallel.pipeline=1", "batch.micro_batch_size=1"]),  # 8 rows over 3 ranks
    (4, ["parallel.tensor=1", "parallel.pipeline=2", "parallel.virtual_pipeline=2", "batch.micro_batch_size=1"]),
    (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=1", "parallel.zero_stage=2"]),
    (2, ["parallel.tensor=1", "parallel.pipeline=1", "parallel.zero_stage=2", "recompute=full"]),
    (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]),
    (4, ["parallel.tensor=4", "parallel.pipeline=1", "batch.micro_batch_size=8"]),
)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 11))])
def test_killed_and_resumed_in_other_layouts(data_folder: Path, undisturbed: Path, tmp_path: Path, seed: int) -> None:
    """Rows to the letter, losses to the order of sums; each layout starts from what another left when it was killed."""
    dice = random.Random(seed)
    run, log = tmp_path / "run", tmp_path / "log"
    kills = len(LAYOUTS) if seed else 3
    chain = dice.sample(LAYOUTS, kills)
    for ranks, layout in chain:
        started, resumed = time.time(), newest(run).step if (run / "checkpoints/latest").exists() else 0
        job = Job(ranks, run_settings(data_folder, run, *layout, "checkpoint.keep=2"), log)
        goal = min(resumed + dice.randint(4, 9), STEPS - 3)
        job.wait_for(lambda goal=goal, started=started: last_step(run, started) >= goal)
        time.sleep(dice.uniform(0, 0.05))  # within a save, or the deletion of an older checkpoint
        job.signal(signal.SIGKILL, dice.choice([None, [dice.randrange(ranks)]]))
        assert -signal.SIGKILL in job.wait()
    ranks, layout = dice.choice(LAYOUTS)
    said = Job(ranks, run_settings(data_folder, run, *layout), log).run()
    assert said.count("resuming from") > kills / 2, "most kills fell before the first checkpoint"
    ours, theirs = history(run), history(undisturbed)
    assert list(ours) == list(range(1, STEPS + 1)), "a step is missing from, or twice in, the accepted history"
    for step, (samples, loss, norm) in ours.items():
        assert samples == theirs[step][0]
        assert abs(loss / theirs[step][1] - 1) <= 1e-5 and abs(norm / theirs[step][2] - 1) <= 1e-4, f"step {step}"
    for name in newest(run).names():
        a, b = newest(run).tensor(name), newest(undisturbed).tensor(name)
        assert torch.linalg.norm(a - b) <= 1e-5 * torch.linalg.norm(b), name


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(settings: list[str]) -> list[str]:
    """The real command, at toy size."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    return [*command, "-m", "megatron_patch", "train", "recipes/demo.yaml", *TOY, "data.held_out_rows=8", *settings]


def wait_for_step(step: int, run: Path, job: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while last_step(run) < step:
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def test_a_rank_killed_under_torchrun_ends_the_job_and_the_next_one_goes_on(
    data_folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = torchrun(run_settings(data_folder, run))
    with (tmp_path / "log").open("w") as output:
        job = subprocess.Popen(command, stdout=output, stderr=output, env=ONE_THREAD)
        try:
            wait_for_step(20, run, job, tmp_path / "log")
            workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
            os.kill(int(workers[2]), signal.SIGKILL)
            killed = time.monotonic()
            assert job.wait(60) != 0
            assert time.monotonic() - killed < 60
        finally:
            job.kill()
            job.wait()
        status = json.loads((run / "status.json").read_text())
        assert status["state"] == "failed" and status["reason"].startswith("another rank is gone")
        output = (tmp_path / "log").read_text()
        assert output.count("stopped: another rank is gone") == 1 and output.count("Traceback") == 1, "torchrun's own"
        before = newest(run).step
        assert 0 < before < STEPS
    said = Job(RANKS, run_settings(data_folder, run), tmp_path / "log").run()
    assert f"resuming from {run}/checkpoints/step_{before:08d}" in said
    assert_bit_equal(newest(run), newest(undisturbed))
    assert history(run) == history(undisturbed)


@pytest.mark.soak
def test_sigterm_to_torchrun_leaves_a_durable_checkpoint(data_folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = torchrun(run_settings(data_folder, run))
    with (tmp_path / "log").open("w") as output:
        job = subprocess.Popen(command, stdout=output, stderr=output, env=ONE_THREAD)
        try:
            wait_for_step(20, run, job, tmp_path / "log")
            job.terminate()
            job.wait(60)
        finally:
            job.kill()
            job.wait()
        status = json.loads((run / "status.json").read_text())
        # torchrun signals one rank after the other: those that come too late for the step learn of it from the sum.
        assert status["state"] == "stopped" and re.search(
            rf"SIGTERM or Ctrl-C on [1-{RANKS}] of {RANKS} ranks", status["reason"]
        )
        assert newest(run).step == status["step"] == len(history(run))
        subprocess.run(command, stdout=output, stderr=output, env=ONE_THREAD, check=True, timeout=180)
    assert_bit_equal(newest(run), newest(undisturbed))
    assert history(run) == history(undisturbed)
