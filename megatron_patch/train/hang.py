"""A rank that stands still: seen by a thread beside the blocked one, which dumps every stack and ends the process.

Each rank watches itself. When one hangs the others soon wait for it in a collective and stand still too, so all dump
their stacks; the one whose stack is not in a collective, or that leaves none (a stopped process), is the cause.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from megatron_patch.parallel import device
from megatron_patch.run.status_file import StatusFile

EXIT_CODE = 70
_GRACE = 10.0  # seconds the first ranks wait for the others to dump theirs


class HangWatch:
    """Watches this process from `beat` to `beat`."""

    def __init__(self, minutes: float, run_folder: Path, rank: int, world_size: int, status: StatusFile) -> None:
        """`minutes` without a beat are a hang; 0 switches the watch off."""
        self._seconds = 60 * minutes
        self._folder, self._rank, self._world_size, self._status = run_folder / "stacks", rank, world_size, status
        self._phase, self._last = "start-up", time.monotonic()
        self._closed = threading.Event()
        faulthandler.enable(2)  # a data file cut short under its memory map ends the process by SIGBUS: say where
        if self._seconds:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():  # of an attempt before
                self._path.replace(self._path.with_suffix(".previous.txt"))
            # Should the blocked thread hold the interpreter's lock, no Python thread runs: C code dumps and exits then.
            self._last_resort = self._path.with_suffix(".locked.txt").open("w")
            self._arm_last_resort()
            threading.Thread(target=self._watch, name="hang watch", daemon=True).start()

    @property
    def _path(self) -> Path:
        return self._folder / f"rank_{self._rank:05d}.txt"

    def beat(self, phase: str) -> None:
        """The process is alive and now begins `phase`."""
        self._phase, self._last = phase, time.monotonic()
        if self._seconds:
            self._arm_last_resort()

    def close(self) -> None:
        self._closed.set()
        if self._seconds:
            faulthandler.cancel_dump_traceback_later()
            self._last_resort.close()
            self._path.with_suffix(".locked.txt").unlink(missing_ok=True)

    def _arm_last_resort(self) -> None:
        faulthandler.dump_traceback_later(self._seconds + 2 * _GRACE, exit=True, file=self._last_resort)

    def _watch(self) -> None:
        while not self._closed.wait(max(0.0, self._last + self._seconds - time.monotonic())):
            if time.monotonic() - self._last >= self._seconds:
                self._end()

    def _end(self) -> None:
        try:
            self._report()
        finally:
            os._exit(EXIT_CODE)

    def _report(self) -> None:
        still = time.monotonic() - self._last
        with self._path.open("w") as file:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            file.write(f"rank {self._rank} on {platform.node()}, {now}: {self._phase} for {still:.0f} s\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        self._path.with_suffix(".collectives.json").write_bytes(device.flight_record())
        time.sleep(_GRACE)
        dumped = {int(p.stem.removeprefix("rank_")) for p in self._folder.glob("rank_?????.txt")}
        silent = sorted(set(range(self._world_size)) - dumped)
        self._status.fail(
            f"hang: no progress for {still:.0f} s in {self._phase}; stacks are in {self._folder}"
            + (f", none from ranks {silent}: their processes are stopped or gone" if silent else "")
        )
