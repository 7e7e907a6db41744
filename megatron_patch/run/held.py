"""Whether what a process goes on to use is still what lies at its path."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP)


class Held:
    """A file or folder as it was found at a path, kept open: nothing else gets its inode number meanwhile."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        """What `descriptor` was opened at `path` for, which stays the caller's to close; else `path` as it is now.

        Raises OSError where it cannot be opened.
        """
        self.path, self._is_mine = path, descriptor is None
        self.descriptor = os.open(path, os.O_RDONLY) if descriptor is None else descriptor
        self._found = os.fstat(self.descriptor)

    def is_at(self, path: Path) -> bool:
        """Whether `path` leads to it; so where a failing file system does not say."""
        try:
            return os.path.samestat(path.stat(), self._found)
        except OSError as error:
            return error.errno not in _NOT_THERE

    def missing(self) -> str:
        """That it is no longer at its path; empty where it is."""
        return "" if self.is_at(self.path) else f"{self.path} is gone from its path (deleted, renamed or replaced)"

    def now(self) -> Path:
        """Where it is by now, whoever renamed it; of what was deleted, a path at which it is not."""
        return Path(f"/proc/self/fd/{self.descriptor}").readlink()

    def close(self) -> None:
        if self._is_mine:
            os.close(self.descriptor)
