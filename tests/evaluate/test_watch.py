"""`eval RUN --watch`: several processes beside a run that writes milestones; killed, beside damage, until the run ends.

The run is what training leaves: real checkpoints by `write_weights`, its status by `StatusFile`. That a real training
job under Slurm is followed in the same way: tests/cluster/test_evaluate.py.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_patch.__main__ import main
from megatron_patch.results import read_scores
from megatron_patch.run.status_file import StatusFile
from megatron_patch.train.checkpoint.write import write_weights
from tests.convert.samples import MemoryWeights, small_recipe
from tests.ranks import run_ranks

_FORK = multiprocessing.get_context("fork")
TASKS = ("piqa", "winogrande", "truthfulqa_mc2")


class Watcher:
    """`eval RUN --watch` in a forked process; its output goes to a file."""

    def __init__(self, log: Path, arguments: list[str]) -> None:
        self.log = log
        log.touch()
        self.process = _FORK.Process(target=self._run, args=(arguments,), daemon=True)
        self.process.start()

    def _run(self, arguments: list[str]) -> None:
        sys.stdout = sys.stderr = self.log.open("w", buffering=1)
        torch.set_num_threads(1)
        sys.exit(main(arguments))

    def end(self, timeout: float = 60) -> int:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still watching:\n{self.log.read_text()}"
        return self.process.exitcode


def wait_for(sign: Callable[[], bool], *watchers: Watcher) -> None:
    deadline = time.monotonic() + 60
    while not sign():
        logs = "\n".join(w.log.read_text() for w in watchers)
        assert time.monotonic() < deadline and all(w.process.exitcode is None for w in watchers), logs
        time.sleep(0.01)


class WatchedRun:
    """A run whose milestones and status the test writes, and those who watch it."""

    def __init__(self, folder: Path, data: Path, tokenizer: Path) -> None:
        self.folder, self.output = folder / "run", folder / "evaluations"
        self._logs = folder
        self.arguments = [
            "eval", str(self.folder), "--watch", "--every=0.05", "--data", str(data), "--tokenizer", str(tokenizer),
            "--output", str(self.output), "--benchmarks=piqa,winogrande,truthfulqa",
        ]  # fmt: skip
        self.status = StatusFile(self.folder, 0)
        self.status.start(total_steps=100)
        self.watchers: list[Watcher] = []

    def milestone(self, number: int, seed: int | None = None) -> Path:
        recipe = small_recipe("model.sequence_length=1024")
        weights = MemoryWeights(recipe, seed=number if seed is None else seed, step=10 * (number + 1))
        weights.tokens = 1000 * weights.step
        write_weights(weights, self.folder / "checkpoints" / f"ckpt_{number:03d}")
        return self.folder / "checkpoints" / f"ckpt_{number:03d}"

    def watch(self, *more: str) -> Watcher:
        self.watchers.append(Watcher(self._logs / f"watcher_{len(self.watchers)}.log", [*self.arguments, *more]))
        return self.watchers[-1]

    def scored(self) -> list[str]:
        return [s["model"].rpartition("--")[2] for s in read_scores(self.output)]

    def done(self) -> Counter[str]:
        """How often each task was finished, by anyone: `ckpt_000: piqa`."""
        text = "".join(w.log.read_text() for w in self.watchers)
        return Counter(f"{m[1]}: {m[2]}" for m in re.finditer(r"--(ckpt_\d+): (\S+) done", text))


@pytest.fixture
def watched(tmp_path: Path, data: Path, tokenizer: Path) -> Iterator[WatchedRun]:
    watched = WatchedRun(tmp_path, data, tokenizer)
    yield watched
    for watcher in watched.watchers:
        watcher.process.kill()


def watch_on_this_rank(arguments: list[str]) -> tuple[int, str]:
    """Exit code and standard error of the command on one of several ranks."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        return main(arguments), errors.getvalue()


def every_task(*numbers: int) -> dict[str, int]:
    return {f"ckpt_{n:03d}: {task}": 1 for n in numbers for task in TASKS}


def test_two_ranks_watch_as_one_process(watched: WatchedRun) -> None:
    for number in range(2):
        watched.milestone(number)
    broken = watched.milestone(2)
    next(broken.glob("*.safetensors")).unlink()
    watched.status.end("completed", "all 100 steps are done", step=100)
    (first, said), (second, silence) = run_ranks(2, watch_on_this_rank, watched.arguments)
    assert (first, second) == (1, 1) and "left out" in said
    assert watched.scored() == ["ckpt_000", "ckpt_001"]
    assert "2 milestones have their scores" in said
    assert Counter(re.findall(r"--(ckpt_\d+: \S+) done", said)) == every_task(0, 1)
    assert " done (" not in silence
    assert (watched.output / "scores.png").is_file()


def test_each_milestone_once_as_it_appears_by_two_processes(watched: WatchedRun) -> None:
    for number in range(3):
        watched.milestone(number)
    first, second = watched.watch(), watched.watch()
    wait_for(lambda: len(watched.scored()) == 3, first, second)
    watched.milestone(3)
    wait_for(lambda: len(watched.scored()) == 4, first, second)
    watched.milestone(4)
    watched.status.end("completed", "all 100 steps are done", step=100)
    assert (first.end(), second.end()) == (0, 0), first.log.read_text() + second.log.read_text()
    assert watched.done() == every_task(0, 1, 2, 3, 4)
    assert watched.scored() == [f"ckpt_{n:03d}" for n in range(5)]
    for watcher in (first, second):
        assert "the run is complete; 5 milestones have their scores" in watcher.log.read_text()
    image = Image.open(watched.output / "scores.png")
    assert image.width > 1000
    newest = max(p.stat().st_mtime for p in watched.output.glob("*/scores.json"))
    assert (watched.output / "scores.png").stat().st_mtime >= newest


def test_killed_in_the_middle_another_takes_over_and_repeats_no_finished_task(watched: WatchedRun) -> None:
    watched.milestone(0)
    killed = watched.watch()
    wait_for(lambda: "(2/3)" in killed.log.read_text(), killed)
    killed.process.kill()
    killed.process.join()
    assert watched.scored() == []
    finished = {p.name: p.stat().st_mtime_ns for p in watched.output.glob("*/tasks/*.json")}
    watched.status.end("completed", "", step=100)
    other = watched.watch()
    assert other.end() == 0, other.log.read_text()
    assert watched.done() == every_task(0)
    after = {p.name: p.stat().st_mtime_ns for p in watched.output.glob("*/tasks/*.json")}
    assert {name: after[name] for name in finished} == finished
    assert watched.scored() == ["ckpt_000"]


def test_a_damaged_milestone_is_named_and_does_not_stop_the_sweep(watched: WatchedRun) -> None:
    broken = watched.milestone(0)
    (file,) = broken.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    watched.milestone(1)
    watched.status.end("completed", "", step=100)
    watcher = watched.watch()
    assert watcher.end() == 1
    assert f"left out: {file}: damaged" in watcher.log.read_text()
    assert watcher.log.read_text().count("left out") == 1
    assert watched.scored() == ["ckpt_001"]


def test_a_run_that_went_back_has_its_new_milestone_evaluated(watched: WatchedRun) -> None:
    watched.milestone(0)
    watcher = watched.watch()
    wait_for(lambda: len(watched.scored()) == 1, watcher)
    shutil.rmtree(watched.folder / "checkpoints/ckpt_000")
    watched.milestone(0, seed=9)
    wait_for(lambda: len(watched.scored()) == 2, watcher)
    watched.status.end("completed", "", step=100)
    assert watcher.end() == 0


@pytest.mark.parametrize(
    ("state", "stop_file", "patience", "word"),
    [
        ("stopped", True, "24", "the run was stopped (STOP)"),
        ("failed", False, "0", "the run has been silent for 0.0 h"),
    ],
)
def test_ends_with_a_run_that_is_stopped_or_silent(
    watched: WatchedRun, state: str, stop_file: bool, patience: str, word: str
) -> None:
    watched.milestone(0)
    if stop_file:
        (watched.folder / "STOP").touch()
    watched.status.end(state, "for a reason")  # type: ignore[arg-type]
    watcher = watched.watch("--patience", patience)
    assert watcher.end() == 0, watcher.log.read_text()
    assert word in watcher.log.read_text()
    assert watched.scored() == ["ckpt_000"]


@pytest.mark.parametrize("state", ["stopped", "failed"])
def test_goes_on_between_two_attempts(watched: WatchedRun, state: str) -> None:
    """Before a time limit, or after a rank has died, the job is put back in the queue."""
    watched.status.end(state, "for a reason")  # type: ignore[arg-type]
    watcher = watched.watch()
    wait_for(lambda: "0 milestones have their scores; waiting" in watcher.log.read_text(), watcher)
    watched.milestone(0)
    wait_for(lambda: "1 milestones have their scores; waiting" in watcher.log.read_text(), watcher)
    watched.milestone(1)
    wait_for(lambda: len(watched.scored()) == 2, watcher)
    watched.status.end("completed", "", step=100)
    assert watcher.end() == 0
