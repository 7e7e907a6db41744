"""A process beside a rank, for when the rank's interpreter stands still and no Python thread of it can say so.

    python -I -S last_resort.py RANK SECONDS SIGNAL STACKS STATUS ROOT

Reads on standard input what the rank is at, a line for each moment in which its Python ran (hang.py). After SECONDS
without one it has the rank dump its stacks (SIGNAL, which C code of the rank handles, into the file STACKS), says so on
standard error and in STATUS, and kills the rank. Time in which the rank was stopped, or this process did not run, does
not count. Ends with the rank, or with standard input. Starts in 20 ms, as it imports nothing else of ROOT before then.
"""

from __future__ import annotations

import contextlib
import os
import platform
import select
import signal
import sys
import time
from pathlib import Path

_TICK = 1.0
_SECONDS_TO_DUMP = 10.0


class Lived:
    """Seconds that a process has run, by moments which lie less than `cap` seconds apart while it runs.

    What lies beyond the cap did not happen to it: it was stopped, its virtual machine was paused, its machine slept.
    """

    def __init__(self, cap: float, now: float) -> None:
        """`now`, here and in `tick`, in seconds on any clock that does not go back."""
        self._cap, self._last = cap, now
        self.seconds = 0.0

    def tick(self, now: float, counts: bool = True) -> None:
        """The process runs now; `counts`: whether the time since the last such moment does."""
        if counts:
            self.seconds += min(now - self._last, self._cap)
        self._last = now


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped: by SIGSTOP or a terminal, or by a debugger."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in "Tt"


def main(argv: list[str]) -> int:
    rank, number, stacks, status, root = int(argv[0]), int(argv[2]), Path(argv[3]), Path(argv[4]), argv[5]
    limit, watched, phase = float(argv[1]), os.getppid(), "start-up"
    tick = min(_TICK, limit / 10)
    for ends in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # the rank's, which outlives them
        signal.signal(ends, signal.SIG_IGN)
    silent = Lived(2 * tick, time.monotonic())
    while True:
        ready, _, _ = select.select([0], [], [], tick)
        silent.tick(time.monotonic(), counts=not is_stopped(watched))
        if ready:
            lines = os.read(0, 1 << 16).decode(errors="replace").splitlines()
            if not lines:
                return 0
            phase, silent.seconds = lines[-1], 0.0
        if os.getppid() != watched:
            return 0
        if silent.seconds >= limit:
            break
    reason = f"hang: the interpreter stood still for {silent.seconds:.0f} s in {phase}; stacks are in {stacks}"
    with contextlib.suppress(OSError):
        os.kill(watched, number)
    end = time.monotonic() + _SECONDS_TO_DUMP
    while time.monotonic() < end and not (stacks.exists() and stacks.stat().st_size):
        time.sleep(0.05)
    with contextlib.suppress(OSError):
        os.write(2, f"stopped: rank {rank} on {platform.node()}: {reason}\n".encode())
    with contextlib.suppress(Exception):  # whatever it is, the rank must end
        _tell(status, reason, rank, root)
    with contextlib.suppress(OSError):
        os.kill(watched, signal.SIGKILL)
    return 0


def _tell(status: Path, reason: str, rank: int, root: str) -> None:
    sys.path.insert(0, root)
    from megatron_patch.launch import read_json, write_json

    content = read_json(status)
    if content.get("state") in ("starting", "running"):  # else it is gone, or another rank was the first to fail
        said = {"state": "failed", "reason": reason, "rank": rank, "node": platform.node(), "updated": time.time()}
        write_json(status, {**content, **said})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
