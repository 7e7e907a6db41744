"""Files that are either whole or not there: write beside, fsync, rename; and one run at a time in a folder."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from io import TextIOBase
from pathlib import Path
from typing import BinaryIO

from data_tools.files.errors import DataError

PARTIAL_SUFFIX = ".partial"
LOCK_NAME = ".lock"
RESERVED_BYTES = 1 << 25
_FALLOC_FL_KEEP_SIZE = 1
_fallocate = ctypes.CDLL(None).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class FolderBusy(DataError):
    """Another process holds a folder."""


def fsync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable."""
    fsync_file(folder)


def fsync_file(path: Path) -> None:
    """Makes what was written to `path`, by whatever library, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share_like_folder(path: Path) -> None:
    """Gives `path` to whoever may use its folder: safetensors makes its files for their owner alone."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def partial_path(path: Path) -> Path:
    """Where `path` is written before it is whole."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def publish(path: Path) -> None:
    """Renames the finished, closed and fsynced partial file of `path` to `path`, durably."""
    partial_path(path).replace(path)
    fsync_folder(path.parent)


@contextlib.contextmanager
def write_beside(path: Path) -> Iterator[BinaryIO]:
    """A stream to `path` that takes its place only when the block ends well; otherwise nothing is left behind.

    Raises:
        DataError: the disk is full or the file cannot be written; the old `path`, if any, is as it was.
    """
    partial = partial_path(path)
    try:
        with full_disk_named(path):
            with partial.open("wb") as stream:
                yield stream
                stream.truncate()  # gives back what was reserved and not used
                os.fsync(stream.fileno())
            publish(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def touched_since(path: Path, marker: Path) -> bool:
    """Whether `path` may be another file than when `marker` was written: written, renamed or linked to since.

    Compares the times of change that the kernel keeps, which no copy carries over and nobody sets. They say nothing
    where the two lie on machines whose clocks differ by more than lies between.
    """
    changed = max(path.stat().st_ctime_ns, path.lstat().st_ctime_ns)
    return changed > marker.stat().st_ctime_ns


@contextlib.contextmanager
def unchanged(path: Path, size: int) -> Iterator[None]:
    """Raises DataError where `path` has not `size` bytes, or is written or replaced while the block reads it."""
    before = path.stat()
    yield
    after = path.stat()
    if before.st_size != size or any(
        getattr(before, name) != getattr(after, name) for name in ("st_size", "st_mtime_ns", "st_ino")
    ):
        raise DataError(
            "changed while it was read", file=path, remedy="let nothing write to it, then run the same command again"
        )


def reserve(stream: BinaryIO) -> int:
    """Asks for RESERVED_BYTES of disk from the stream's place on, which makes writing them cheaper; returns their end.

    What the file system answers does not matter: some cannot, and on a full disk the last bytes may fit none the less.
    `os.posix_fallocate` would write into every block instead.
    """
    at = stream.tell()
    _fallocate(stream.fileno(), _FALLOC_FL_KEEP_SIZE, at, RESERVED_BYTES)
    return at + RESERVED_BYTES


def write_whole(path: Path, content: bytes) -> None:
    """Writes a small file so that it is whole or not there."""
    with write_beside(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Gives errors of the system that name no file (a read that fails) the name of this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # gzip's errors are none of the system's: a name would take their words' place
            error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turns "no space left" into an error that names the file; other errors of the system learn its name."""
    try:
        with errors_named(path):
            yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(
            f"cannot write: {os.strerror(error.errno)}",
            file=path,
            remedy="free space, then run the same command again: finished work is kept",
        ) from None


@contextlib.contextmanager
def folder_lock(folder: Path, name: str = LOCK_NAME, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Holds `folder` for this process; the kernel lets go when the process ends, however it ends.

    Tasks of a Slurm array that each do a part hold the folder `shared` and their own part, by `name`, alone.

    Args:
        wait: for a moment's work that several processes do one after the other.

    Raises:
        FolderBusy: another process holds it.
        DataError: the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise FolderBusy(
                "another run is writing this folder",
                file=folder,
                place=name,
                remedy="wait for it to end, or choose another --output",
            ) from None
        except OSError as error:
            raise DataError(
                f"this file system has no locks ({error.strerror}), so two runs could spoil each other's work",
                file=folder,
                remedy="mount it with locks (Lustre: -o flock), or choose an --output elsewhere",
            ) from None
        if not _is_at(stream, path):  # who held it has renamed or removed the folder
            raise FolderBusy(
                "another run has just finished with this folder", file=folder, place=name, remedy="look what it left"
            )
        yield


def take_place(partial: Path, final: Path) -> None:
    """Renames the finished folder `partial` to `final`, never in place of another.

    Raises:
        DataError: something of that name came meanwhile.
    """
    try:
        partial.rename(final)  # of an empty folder it takes the place
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise DataError(
            "something else was put there meanwhile", file=final, remedy="choose a new folder or remove this one"
        ) from None


def _is_at(stream: TextIOBase, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def new_folder(final: Path, partial: Path) -> Iterator[None]:
    """Holds `partial`, empty, for a block that fills it and renames it to `final`; after a failure it is gone.

    The lock goes last, in its new place: in between, a second process would find a folder that is free.

    Raises:
        FolderBusy: another process writes it.
        DataError: `final` is there, or the file system has no locks.
    """
    with folder_lock(partial):
        try:
            if os.path.lexists(final):
                raise DataError("exists", file=final, remedy="choose a new folder or remove this one")
            for left in partial.iterdir():  # by a process that was killed
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left)
                elif left.name != LOCK_NAME:
                    left.unlink()
            yield
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        (final / LOCK_NAME).unlink()
