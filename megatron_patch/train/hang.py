"""A rank that stands still: seen by a thread beside the blocked one, which dumps every stack and ends the process.

Each rank watches itself. When one hangs the others soon wait for it in a collective and stand still too, so all dump
their stacks; the one whose stack is not in a collective, or that leaves none (a stopped process), is the cause.

Only time counts in which the process ran: one that was stopped and goes on, with its virtual machine or its laptop for
hours, has not stood still.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import megatron_patch
from megatron_patch.launch import LaunchError, complain
from megatron_patch.parallel import device
from megatron_patch.run.status_file import StatusFile
from megatron_patch.train import last_resort
from megatron_patch.train.last_resort import Lived

EXIT_CODE = 70
_TICK = 1.0  # seconds between two looks of the watch
_GRACE = 10.0  # seconds the first ranks wait for the others to dump theirs
_DUMP = signal.SIGRTMIN + 1  # nobody else's


class HangWatch:
    """Watches this process from `beat` to `beat`."""

    def __init__(self, minutes: float, run_folder: Path, rank: int, world_size: int, status: StatusFile) -> None:
        """`minutes` without a beat, as far as this process has lived them, are a hang; 0 switches the watch off."""
        self._seconds = 60 * minutes
        self._folder, self._rank, self._world_size, self._status = run_folder / "stacks", rank, world_size, status
        self._phase, self._beats = "start-up", 0
        self._closed = threading.Event()
        faulthandler.enable(2)  # a data file cut short under its memory map ends the process by SIGBUS: say where
        if self._seconds:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._path.exists():  # of an attempt before
                self._path.replace(self._path.with_suffix(".previous.txt"))
            self._start_last_resort()
            self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
            self._thread.start()

    @property
    def _path(self) -> Path:
        return self._folder / f"rank_{self._rank:05d}.txt"

    def beat(self, phase: str) -> None:
        """The process is alive and now begins `phase`."""
        self._phase = phase
        self._beats += 1
        self._tell()

    def close(self) -> None:
        self._closed.set()
        if self._seconds:
            self._thread.join()
            self._beside.kill()
            self._beside.wait()
            self._ticks.close()
            faulthandler.unregister(_DUMP)
            self._locked.close()
            self._path.with_suffix(".locked.txt").unlink(missing_ok=True)

    def _start_last_resort(self) -> None:
        """Should the blocked thread hold the interpreter's lock, no Python thread runs: another process sees that."""
        stacks = self._path.with_suffix(".locked.txt")
        self._locked = stacks.open("w")
        faulthandler.register(_DUMP, self._locked, all_threads=True)
        seconds, root = self._seconds + 2 * _GRACE, Path(megatron_patch.__file__).parent.parent
        told = (self._rank, seconds, int(_DUMP), stacks.absolute(), self._status.path.absolute(), root)
        command = [sys.executable, "-I", "-S", last_resort.__file__, *map(str, told)]
        try:
            self._beside = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            raise LaunchError(
                f"the watch for hangs cannot start its process on {platform.node()}: {error}; give the rank more "
                "processes (`ulimit -u`, the container's pids limit), or set watchdog.hang_minutes=0"
            ) from None
        assert self._beside.stdin is not None
        self._ticks = self._beside.stdin
        os.set_blocking(self._ticks.fileno(), False)  # it may be stopped itself

    def _tell(self) -> None:
        """Python runs."""
        if self._seconds and not self._closed.is_set():
            with contextlib.suppress(OSError):  # somebody may have stopped or killed it
                os.write(self._ticks.fileno(), f"{self._phase}\n".encode())

    def _watch(self) -> None:
        tick = min(_TICK, self._seconds / 10)
        lived, beats = Lived(2 * tick, time.monotonic()), self._beats
        while not self._closed.wait(max(0.0, min(tick, self._seconds - lived.seconds))):
            lived.tick(time.monotonic())
            self._tell()
            if self._beats != beats:
                beats, lived.seconds = self._beats, 0.0
            if lived.seconds >= self._seconds:
                self._end(lived.seconds)

    def _end(self, still: float) -> None:
        try:
            self._report(still)
        finally:
            os._exit(EXIT_CODE)

    def _report(self, still: float) -> None:
        reason = f"hang: no progress for {still:.0f} s in {self._phase}"
        try:
            with self._path.open("w") as file:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                file.write(f"rank {self._rank} on {platform.node()}, {now}: {self._phase} for {still:.0f} s\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            self._path.with_suffix(".collectives.json").write_bytes(device.flight_record())
        except OSError as error:
            complain(f"stopped: {reason} on rank {self._rank}; its stacks cannot be written ({error})")
        time.sleep(_GRACE)
        dumped = {int(p.stem.removeprefix("rank_")) for p in self._folder.glob("rank_?????.txt")}
        silent = sorted(set(range(self._world_size)) - dumped)
        self._status.fail(
            f"{reason}; stacks are in {self._folder}"
            + (f", none from ranks {silent}: their processes are stopped or gone" if silent else "")
        )
