"""Opening files that others may have put there: a pipe, a socket or a device would be waited for, or read, for ever."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from data_tools.files.errors import DataError


def open_plain(path: Path) -> BinaryIO:
    """A file to read from; OSError, at once, also where it is no plain file or no name of one."""
    try:
        stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    except ValueError as error:  # "embedded null byte"
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        return stream
    stream.close()
    raise OSError(errno.EINVAL, "Is not a plain file", str(path))


def read_plain(path: Path) -> bytes:
    """A file's content. Raises as `open_plain` does."""
    with open_plain(path) as stream:
        return stream.read()


def file_size(path: Path) -> int:
    """Size of a file that must exist.

    Raises:
        DataError: there is no such file, or it is a folder, a pipe or a device.
    """
    remedy = "build, fetch or copy it again"
    try:
        status = path.stat()
    except FileNotFoundError:
        raise DataError("no such file", file=path, remedy=remedy) from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError("not a plain file", file=path, remedy=remedy)
    return status.st_size


def read_exactly(stream: object, buffer: memoryview, path: Path) -> None:
    """Fills `buffer` from an unbuffered stream.

    Raises:
        DataError: the file ends before.
    """
    filled = 0
    while filled < len(buffer):
        count = stream.readinto(buffer[filled:])  # type: ignore[attr-defined]
        if not count:
            raise DataError("the file ends too early", file=path, remedy="the file was cut short while it was read")
        filled += count
