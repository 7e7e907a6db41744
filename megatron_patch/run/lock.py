"""One training at a time in a run folder: the first rank holds RUN/.lock while it lives.

The kernel lets go of the lock when the process ends, however it ends, on every node that shares the file system.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

LOCK_NAME = ".lock"
_LOOKS = 10  # `is_abandoned` of another process holds the lock for a moment
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
            _take(self._file)
        except BlockingIOError:
            busy = _busy_by(run, self._file)
            self._file.close()
            raise busy from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        self._file.truncate(0)
        job = os.environ.get("SLURM_JOB_ID")
        self._file.write(f"process {os.getpid()} on {platform.node()}" + (f", Slurm job {job}" if job else ""))
        self._file.flush()

    def release(self) -> None:
        self._file.close()


def _take(file: IO[str]) -> None:
    """Raises BlockingIOError where another holds it for longer than a look at it takes."""
    for _ in range(_LOOKS):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.01)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_abandoned(run: Path) -> bool:
    """Whether the training that held the run folder last was one of this node's and is gone.

    Of another node's it cannot be said: a file system may keep locks to each node. Changes nothing.
    """
    try:
        with (run / LOCK_NAME).open() as file:
            if not _is_free(file):
                return False
            holder = re.fullmatch(r"process \d+ on (.*?)(, Slurm job \d+)?", file.read(4096))
            return holder is not None and holder[1] == platform.node()
    except OSError:  # not there, or not to be read
        return False


def _is_free(file: IO[str]) -> bool:
    """Whether nobody holds the lock now, as far as the file system can say."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return True


def _busy_by(run: Path, file: IO[str]) -> RunBusy:
    file.seek(0)
    return RunBusy(f"{run}: another training runs here: {file.read().strip() or 'an unknown process'}")


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
        with (run / LOCK_NAME).open() as file:
            return None if _is_free(file) else _busy_by(run, file)
    except FileNotFoundError:
        return None
