"""One training at a time in a run folder: the first rank holds RUN/.lock while it lives.

The kernel lets go of the lock when the process ends, however it ends, on every node that shares the file system.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

LOCK_NAME = ".lock"
# A file system mounted without locks (Lustre without `flock`) cannot say who else is there.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class RunBusy(RuntimeError):
    """Another process trains in the run folder; the message says which."""


class RunLock:
    """Holds a run folder for this process until `release`, or until the process ends."""

    def __init__(self, run: Path) -> None:
        """Raises RunBusy where another process holds it, OSError where the folder cannot be made or written."""
        run.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = (run / LOCK_NAME).open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "an unknown process"
            self._file.close()
            raise RunBusy(f"{run}: another training runs here: {holder}") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        self._file.truncate(0)
        job = os.environ.get("SLURM_JOB_ID")
        self._file.write(f"process {os.getpid()} on {platform.node()}" + (f", Slurm job {job}" if job else ""))
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def wait_until_free(run: Path, seconds: float, note: Callable[[str], None]) -> None:
    """Give a training that is about to end the time to do so. Raises RunBusy where it goes on for longer."""
    end = time.monotonic() + seconds
    busy = _busy(run)
    if busy is not None and seconds:
        note(f"{busy}; waiting up to {seconds:g} s for its end")
    while busy is not None and time.monotonic() < end:
        time.sleep(0.5)
        busy = _busy(run)
    if busy is not None:
        raise busy


def _busy(run: Path) -> RunBusy | None:
    try:
        RunLock(run).release()
    except RunBusy as busy:
        return busy
    return None
