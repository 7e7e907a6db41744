"""RUN/status.json: how a run stands, and why it ended. torchrun and srun do not carry exit codes through; this does.

state                starting, running, completed, stopped (on request, resumes), failed
reason               why it is not running; null while it is
step, total_steps    optimizer steps done and planned
samples, tokens      rows consumed, labels trained on
loss                 nats a token, of the last step
tokens_per_second    of the job, lately
eta_seconds          to the last step at that rate
checkpoint           newest durable restart point: name, step, time; null before the first
rank, node           who wrote the reason
ranks, layout        world size; for people
attempt_started, updated    seconds since 1970
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any, Literal

from megatron_patch import launch

State = Literal["starting", "running", "completed", "stopped", "failed"]
STATUS_NAME = "status.json"
_SECONDS_BETWEEN_WRITES = 5.0


class StatusFile:
    """Rank 0 keeps the file up to date; any rank may write why it failed."""

    def __init__(self, run_folder: Path, rank: int) -> None:
        self._path, self._rank = run_folder / STATUS_NAME, rank
        self._content: dict[str, Any] = {}
        self._written = 0.0

    def start(self, **content: Any) -> None:
        """A new attempt begins; what the attempt before left is kept in the log, not here."""
        if self._rank == 0:
            self._content = {"state": "starting", "reason": None, "checkpoint": None, "attempt_started": time.time()}
            self._write(content)

    def progress(self, **content: Any) -> None:
        """The run goes on; written at most every few seconds."""
        if self._rank == 0:
            self._content |= {"state": "running", **content}
            if time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
                self._write({})

    def checkpoint(self, name: str, step: int, when: float) -> None:
        """A restart point is durable since `when`, in seconds since 1970 (rank 0)."""
        self._content["checkpoint"] = {"name": name, "step": step, "time": when}

    def end(self, state: State, reason: str, **content: Any) -> None:
        """The attempt is over, all ranks agreeing (rank 0 writes)."""
        if self._rank == 0:
            self._write({"state": state, "reason": reason, "rank": 0, "node": platform.node(), **content})

    def refuse(self, reason: str) -> None:
        """Bad input: no attempt began. A completed run stays completed."""
        if self._rank == 0 and self._read().get("state") != "completed":
            self._content = self._read()
            self._write({"state": "failed", "reason": f"refused: {reason}", "rank": 0, "node": platform.node()})

    def fail(self, reason: str) -> None:
        """This rank cannot go on. The first rank to fail is the cause; what others say after it is left out."""
        content = self._read()
        if content.get("state") not in ("failed", "stopped", "completed"):
            self._content = {**content, **self._content}
            self._write({"state": "failed", "reason": reason, "rank": self._rank, "node": platform.node()})

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return {}

    def _write(self, content: dict[str, Any]) -> None:
        self._content |= {**content, "updated": time.time()}
        launch.write_json(self._path, self._content)
        self._written = time.monotonic()
