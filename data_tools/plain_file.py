"""Opening files that others may have put there: a pipe, a socket or a device would be waited for, or read, for ever."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_plain(path: Path) -> BinaryIO:
    """A file to read from; OSError, at once, also where it is no plain file."""
    stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        return stream
    stream.close()
    raise OSError(errno.EINVAL, "Is not a plain file", str(path))


def read_plain(path: Path) -> bytes:
    """A file's content. Raises as `open_plain` does."""
    with open_plain(path) as stream:
        return stream.read()
