"""A service's side of the training process: it starts the process that feeds the service, and ends it.

The libraries of services start threads and processes, wait for a network, and retry; in a process of their own, which
reads RUN/log.jsonl (`follow.py`), they can neither delay a step nor end a run, and nothing is lost while they wait.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.files.durable import write_whole
from data_tools.files.plain_file import open_plain, read_plain
from megatron_patch.train.note import note

FOLDER_NAME = "loggers"
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SECONDS_TO_FINISH = 30
"""How long an attempt that is over waits for what is still on its way to a service."""


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


class ServiceProcess:
    """Feeds the service `name` from RUN/log.jsonl while this process lives. Its output: RUN/loggers/NAME.log."""

    def __init__(self, name: str, run_folder: Path, done: int) -> None:
        """After log.jsonl was opened for this attempt, which goes on from step `done`. Raises OSError."""
        self._name, self._run_folder = name, run_folder
        (run_folder / FOLDER_NAME).mkdir(exist_ok=True)
        command = [sys.executable, "-m", "megatron_patch.train.loggers.follow", name, str(run_folder.resolve())]
        # The log of this attempt, opened: the next attempt may put another in its place while this one's is still read.
        with open_plain(run_folder / "log.jsonl") as log:
            command += [f"--log={log.fileno()}", f"--run-id={_run_id(run_folder)}", f"--done={done}"]
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                [*command, f"--finish={SECONDS_TO_FINISH}"],
                stdin=subprocess.PIPE,
                pass_fds=[log.fileno()],
                # A process that torchrun started would else be taken for a rank by a library that asks.
                env={
                    key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
                },
            )

    def write(self, record: Mapping[str, Any]) -> None:
        """The record stands in log.jsonl, from where it is sent."""
        if self._process is not None and self._process.poll() is not None:
            note(f"{self._told(self._process.returncode)}; what follows is in log.jsonl alone")
            self._process = None

    def close(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            code = self._process.wait(SECONDS_TO_FINISH + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if code:
            note(f"{self._told(code)}; log.jsonl has everything, and the next attempt sends what is missing")
        self._process = None

    def _told(self, code: int) -> str:
        log = self._run_folder / FOLDER_NAME / f"{self._name}.log"
        return f"run.loggers: {self._name} did not take all of this attempt (exit {code}, see {log})"


def _run_id(run_folder: Path) -> str:
    """The run's identity, the same for every attempt and service; drawn for the first."""
    path = run_folder / FOLDER_NAME / "run_id"
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        known = read_plain(path).decode().strip()
        if len(known) == 32 and known.isalnum() and known.isascii():
            return known
        note(f"{path}: holds no id of a run; services take this attempt for the first of a new one")
    drawn = uuid.uuid4().hex
    write_whole(path, f"{drawn}\n".encode())
    return drawn
