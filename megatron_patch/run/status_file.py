"""RUN/status.json: how a run stands, and why it ended. torchrun and srun do not carry exit codes through; this does.

state                starting, running (a step is done), completed, stopped (on request, resumes), failed
reason               why it is not running; null while it is
step, total_steps    optimizer steps done and planned
samples, tokens      rows consumed, labels trained on
loss                 nats a token, of the last step
tokens_per_second    of the job, lately
eta_seconds          to the last step at that rate
withheld             updates that the watchdog withheld since step 0
checkpoint           newest durable restart checkpoint: name, step, time; null before the first
rank, node           who wrote the reason
ranks, layout        world size; for people
attempt_started, updated    seconds since 1970
"""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from pathlib import Path
from typing import Any, Literal

from data_tools.files.durable import full_disk_named
from megatron_patch import launch
from megatron_patch.recipe import RecipeError
from megatron_patch.run.attempts import REFUSED
from megatron_patch.run.held import Held
from megatron_patch.run.lock import LOCK_NAME, RunBusy, RunLock

State = Literal["starting", "running", "completed", "stopped", "failed"]
STATUS_NAME = "status.json"
_SECONDS_BETWEEN_WRITES = 5.0


class StatusFile:
    """Rank 0 holds the run folder and keeps the file up to date; any rank may write why it failed.

    A disk that is full or gone must not end a training that could go on without this file: after `start`, what cannot
    be written is reported on standard error and left out.
    """

    def __init__(self, run_folder: Path, rank: int) -> None:
        """Raises RecipeError (rank 0) where the run folder cannot be written or another training holds it."""
        self.path, self._rank = run_folder / STATUS_NAME, rank
        self._content: dict[str, Any] = {}
        self._written = 0.0
        self._seen: list[Held] = []  # what this rank, not the first one, has found in place
        if rank == 0:
            try:
                self.lock = RunLock(run_folder)
            except RunBusy as error:
                raise RecipeError(f"run.folder {error}; wait for its end, or choose another run.folder") from None
            except OSError as error:
                raise RecipeError(
                    f"run.folder {run_folder}: cannot be written ({error}); choose another run.folder"
                ) from None
            if self.path.exists() and not self.path.is_file():
                raise RecipeError(f"{self.path}: is no plain file; move it away, or choose another run.folder")

    def start(self, **content: Any) -> None:
        """A new attempt begins; what the attempt before left is kept in the log, not here.

        Raises DataError where the disk is full, OSError where it cannot be written for another reason.
        """
        if self._rank == 0:
            self._content = {"state": "starting", "reason": None, "checkpoint": None, "attempt_started": time.time()}
            with full_disk_named(self.path):
                self._write(content, must=True)  # what the attempt before left would be taken for this one's

    def resumed(self, **content: Any) -> None:
        """From where this attempt goes on; the first rank has the run folder by then."""
        if self._rank == 0:
            self._write(content)
        else:
            with contextlib.suppress(OSError):  # not to be read: then it cannot be written either
                self._seen = [Held(self.path.parent), Held(self.path.with_name(LOCK_NAME))]

    def look(self) -> str:
        """What of the run folder and its lock is gone from its path (rank 0), see `RunLock.look`."""
        gone = self.lock.look()
        self.path = self.lock.place / STATUS_NAME
        return gone

    def progress(self, **content: Any) -> None:
        """A step is done; written at once for the first, then at most every few seconds."""
        if self._rank == 0:
            is_first = self._content["state"] == "starting"
            self._content |= {"state": "running", **content}
            if is_first or time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
                self._write({})

    def checkpoint(self, name: str, step: int, when: float) -> None:
        """A restart checkpoint is durable since `when`, in seconds since 1970 (rank 0)."""
        self._content["checkpoint"] = {"name": name, "step": step, "time": when}

    def end(self, state: State, reason: str, **content: Any) -> None:
        """The attempt is over, all ranks agreeing (rank 0 writes)."""
        if self._rank == 0:
            self._write({"state": state, "reason": reason, "rank": 0, "node": platform.node(), **content})

    def refuse(self, reason: str) -> None:
        """Bad input: no attempt began. A completed run stays completed."""
        if self._rank == 0 and launch.read_json(self.path).get("state") != "completed":
            self._content = launch.read_json(self.path)
            self._write({"state": "failed", "reason": REFUSED + reason, "rank": 0, "node": platform.node()})

    def fail(self, reason: str) -> None:
        """This rank cannot go on. The first rank to fail is the cause; what other ranks report after it is left out."""
        try:
            content = launch.read_json(self.path)
        except OSError:  # the folder is gone: what ended the run must still be said
            content = {}
        if content.get("state") not in ("failed", "stopped", "completed"):
            self._content = {**content, **self._content}
            self._write({"state": "failed", "reason": reason, "rank": self._rank, "node": platform.node()})
        elif self._rank == 0 and content["state"] == "failed" and self._content:
            # The other rank wrote what it had read here, which is up to some seconds old.
            self._write({name: content[name] for name in ("state", "reason", "rank", "node") if name in content})

    def _write(self, content: dict[str, Any], must: bool = False) -> None:
        self._content |= {**content, "updated": time.time()}
        self._written = time.monotonic()
        try:
            if not (must or self._is_ours()):  # what lies there may be another training's
                raise FileNotFoundError(f"{self.path.parent} or its lock is gone from its path")
            launch.write_json(self.path, self._content)
        except OSError as error:
            if must:
                raise
            if self._rank == 0:
                launch.say(f"{self.path}: cannot be written ({error})", sys.stderr)

    def _is_ours(self) -> bool:
        return self.lock.holds() if self._rank == 0 else not any(held.missing() for held in self._seen)
