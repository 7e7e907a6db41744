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
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from megatron_patch.run.held import Held

LOCK_NAME = ".lock"
_LOOKS = 10  # `is_abandoned` of another process holds the lock for a moment
# A file system mounted without locks (Lustre without `flock`) cannot say who else is there.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class RunBusy(RuntimeError):
    """Another process trains in the run folder; the message says which."""


class RunLock:
    """Holds a run folder for this process until `release`, or until the process ends.

    What is held are the folder and the lock that were at the paths when they were taken. `look` finds out whether they
    still are, and where not follows the folder, so that nothing is written where another training may begin.
    """

    def __init__(self, run: Path) -> None:
        """Raises RunBusy where another process holds it, OSError where the folder cannot be made or written."""
        self.place = run
        """Where the run is written: its folder, wherever that is by now, or a new one in place of a deleted one."""
        self.taken = ""
        """Why `place` must not be written any more; empty while it may."""
        self._gone = ""
        self._mutex = threading.Lock()  # the loop and a thread that saves look
        self._hold(run)

    def _hold(self, run: Path) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self._file = _lock_file(run)
        self._lock, self._folder = Held(run / LOCK_NAME, self._file.fileno()), Held(run)
        self._written = self._file_time()

    def look(self) -> str:
        """What of folder and lock was found to be no longer at its path, now or before; empty where both always were.

        It also follows: `place` is where the run goes on, unless `taken` says why nowhere.
        """
        with self._mutex:
            if not self.taken and (gone := self._missing()):
                self._gone = self._gone or gone
                self._follow()
            return self._gone

    def holds(self) -> bool:
        """Whether what lies at `place` now is this process's."""
        with self._mutex:
            return not (self.taken or self._missing())

    def _missing(self) -> str:
        return self._folder.missing() or self._lock.missing() or self._other_holder()

    def _other_holder(self) -> str:
        """Where a file system has no locks, another training can be told by its name in the file alone."""
        if self._file_time() == self._written:
            return ""
        self._file.seek(0)
        if self._file.read(4096) != _name():
            return str(_busy_by(self.place, self._file))
        self._written = self._file_time()
        return ""

    def _file_time(self) -> int:
        return os.fstat(self._file.fileno()).st_mtime_ns

    def _follow(self) -> None:
        moved = self._folder.now()
        is_deleted = not self._folder.is_at(moved)
        if not is_deleted:
            self.place = moved
        try:
            if is_deleted or not self._lock.is_at(self.place / LOCK_NAME):
                file, folder = self._file, self._folder
                self._hold(self.place)
                file.close()
                folder.close()
                return
            self._folder.path, self._lock.path = self.place, self.place / LOCK_NAME
            self.taken = self._other_holder()
        except (RunBusy, OSError) as error:
            self.taken = str(error)

    def release(self) -> None:
        self._file.close()
        self._folder.close()


def _lock_file(run: Path) -> IO[str]:
    """RUN/.lock, held and signed by this process."""
    while True:
        file: IO[str] = (run / LOCK_NAME).open("a+")
        try:
            _take(file)
        except BlockingIOError:
            busy = _busy_by(run, file)
            file.close()
            raise busy from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
        if Held(run / LOCK_NAME, file.fileno()).is_at(run / LOCK_NAME):
            break
        file.close()  # deleted between the two: the next one would be admitted
    file.truncate(0)
    file.write(_name())
    file.flush()
    return file


def _name() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"process {os.getpid()} on {platform.node()}" + (f", Slurm job {job}" if job else "")


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
