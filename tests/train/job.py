"""Whole training jobs for tests: forked ranks that run the `train` command in all but the imports.

A job may be killed, signalled and started again. As under a launcher, one rank's death ends the others.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data_tools.dataset.format import segment_name
from data_tools.dataset.segment_files import DatasetPlan, write_dataset_manifest
from megatron_patch.train import loop, signals
from tests.data.conftest import write_rows
from tests.toy import TOY

STEPS = 60
LAYOUT = ["parallel.tensor=2", "parallel.pipeline=2", "batch.micro_batch_size=4"]
RANKS = 4

_CONTEXT = multiprocessing.get_context("fork")
ROW_LENGTH, VOCAB = 17, 64  # of the toy model


def write_data_set(folder: Path, num_segments: int = 3, rows: int = 200, seed: int = 0) -> Path:
    """A data set of random rows for the toy model, with as many held-out rows as a global batch has."""
    folder.mkdir(parents=True)
    random = np.random.RandomState(seed)
    plan = DatasetPlan(num_segments, ROW_LENGTH, VOCAB, None, has_held_out=True)
    for name, count in [*((segment_name(k), rows) for k in range(num_segments)), ("held_out", 8)]:
        ids = random.randint(0, VOCAB, (count, ROW_LENGTH)).astype("<u2")
        write_rows(folder / name, ids, np.zeros(count, np.uint8), plan)
    write_dataset_manifest(folder, plan)
    return folder


class Job:
    """One start of all ranks: `python -m megatron_patch train recipes/demo.yaml` at toy size, with `overrides`.

    `before(rank)` runs in each rank first, to plant what a test wants to go wrong there.
    """

    def __init__(
        self,
        world_size: int,
        overrides: Sequence[str],
        log: Path,
        before: Callable[[int], None] = lambda rank: None,
        accept_changes: bool = False,
    ) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        store = log.with_suffix(f".{time.monotonic_ns()}.store")
        args = argparse.Namespace(
            recipe=Path("recipes/demo.yaml"),
            overrides=[*TOY, "data.held_out_rows=8", "watchdog.hang_minutes=1", *overrides],
            accept_changes=accept_changes,
        )
        self.ranks: list[BaseProcess] = []
        for rank in range(world_size):
            process = _CONTEXT.Process(target=_rank, args=(rank, world_size, store, log, before, args), daemon=True)
            process.start()
            self.ranks.append(process)

    def signal(self, number: int, ranks: Sequence[int] | None = None) -> None:
        for rank, process in enumerate(self.ranks):
            if (ranks is None or rank in ranks) and process.exitcode is None:
                os.kill(process.pid, number)  # type: ignore[arg-type]

    def kill(self) -> None:
        """-9 to every rank."""
        self.signal(signal.SIGKILL)
        for process in self.ranks:
            process.join()

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes; as soon as a rank fails the others are killed. AssertionError with the log at the time limit."""
        deadline = time.monotonic() + timeout
        while alive := [p for p in self.ranks if p.exitcode is None]:
            if not any(p.exitcode for p in self.ranks):  # a rank may have failed before this began to wait
                wait([p.sentinel for p in alive], max(0.0, deadline - time.monotonic()))
            if any(p.exitcode for p in self.ranks):
                for process in self.ranks:  # a failure of all ends them within moments
                    process.join(2)
                self.kill()
            elif time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"still running after {timeout:g} s:\n{self.log.read_text()}")
        return [int(p.exitcode) for p in self.ranks]  # type: ignore[arg-type]

    def run(self, timeout: float = 120) -> str:
        """Wait for a job that must succeed; what its ranks printed."""
        codes = self.wait(timeout)
        assert not any(codes), f"exit codes {codes}:\n{self.log.read_text()}"
        return self.log.read_text()

    def wait_for(self, sign: Callable[[], bool], timeout: float = 60) -> None:
        """Until `sign()` holds; AssertionError where the job ends or the time is over before."""
        deadline = time.monotonic() + timeout
        while not sign():
            if time.monotonic() > deadline or all(p.exitcode is not None for p in self.ranks):
                self.kill()
                raise AssertionError(f"did not come to it:\n{self.log.read_text()}")
            time.sleep(0.005)


def _rank(
    rank: int, world_size: int, store: Path, log: Path, before: Callable[[int], None], args: argparse.Namespace
) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the tests
    sys.stdout = sys.stderr = output = log.open("a", buffering=1)  # pytest has put its own objects there
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, though the tests may run under nohup
    signals.hold()
    before(rank)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=2),
    )
    sys.exit(loop.main(args))


def run_settings(data_folder: Path, run: Path, *overrides: str) -> list[str]:
    """The demo recipe's layout at toy size, 60 steps, two milestones, no clock."""
    settings = ["checkpoint.interval_minutes=0", "checkpoint.interval_steps=3", "data.held_out_interval=20"]
    return [*LAYOUT, f"data.folder={data_folder}", f"run.folder={run}", f"run.steps={STEPS}", *settings, *overrides]
