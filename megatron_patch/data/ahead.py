"""Prefetches or stages a segment before its rows are read: small random reads are poison to a parallel file system.

Either a segment's `.bin` is copied, whole and checked, to storage of the node (`stage_folder`) by whichever
of its ranks comes first; or it is read through once, front to back, so that the page cache holds it. The segment after
the one in use is brought by a thread meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from data_tools.dataset.format import SegmentManifest
from data_tools.files.digest import new_digest
from data_tools.files.errors import DataError

BLOCK_BYTES = 1 << 23


class Ahead:
    """Where to read a segment's `.bin` from, and the prefetch of the next one."""

    def __init__(
        self, folder: Path, segments: list[SegmentManifest], *, read: bool, stage_folder: Path | None, again: bool
    ) -> None:
        """`again`: after the last segment comes the first. Raises DataError where `stage_folder` cannot be written."""
        self._folder, self._segments, self._read, self._again = folder, segments, read, again
        self._stage_folder = stage_folder
        if stage_folder is not None:
            with contextlib.suppress(OSError):  # said below
                stage_folder.mkdir(parents=True, exist_ok=True)
            if not (stage_folder.is_dir() and os.access(stage_folder, os.W_OK | os.X_OK)):
                raise DataError(
                    f"no folder on {platform.node()} that segments can be copied to",
                    file=stage_folder,
                    remedy="name one on the node's own disk as data.stage_folder, or leave it out",
                )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="segment-ahead")
        self._coming: dict[int, Future[Path]] = {}

    def path(self, segment: int) -> Path:
        """The file to read a segment from; waits for its staging, and starts on the segment after it."""
        if self._stage_folder is None and not self._read:
            return self._source(segment)
        if segment not in self._coming:
            self._bring(segment)
        following = segment + 1
        if following == len(self._segments) and self._again:
            following = 0
        if following < len(self._segments):
            self._bring(following)
        coming = self._coming[segment]
        self._coming = {k: future for k, future in self._coming.items() if k in (segment, following)}
        if self._stage_folder is None:
            return self._source(segment)  # rows can be read while the rest of the segment is still coming
        path = coming.result()
        before = (segment - 1) % len(self._segments)
        if (segment or self._again) and before not in (segment, following):
            # Ranks that still read the segment before have it mapped, which outlives its name.
            self._staged(before).unlink(missing_ok=True)
        return path

    def close(self) -> None:
        """Ends the thread; what is being fetched is finished first."""
        self._thread.shutdown(cancel_futures=True)

    def _bring(self, segment: int) -> None:
        if segment not in self._coming:
            work = self._read_through if self._stage_folder is None else self._stage
            self._coming[segment] = self._thread.submit(work, segment)

    def _source(self, segment: int) -> Path:
        return self._folder / f"{self._segments[segment].name}.bin"

    def _staged(self, segment: int) -> Path:
        assert self._stage_folder is not None
        # The digest in the name: a file left by a job with other data is another file.
        record = self._segments[segment]
        return self._stage_folder / f"{record.name}-{record.digests['bin']}.bin"

    def _read_through(self, segment: int) -> Path:
        path = self._source(segment)
        buffer = bytearray(BLOCK_BYTES)
        with path.open("rb", buffering=0) as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            while stream.readinto(buffer):
                pass
        return path

    def _stage(self, segment: int) -> Path:
        """Copies a segment unless another process of the node has; without room, the data set itself is read.

        Raises:
            DataError: the bytes are not those of the manifest.
        """
        source, target = self._source(segment), self._staged(segment)
        with target.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits for whoever is copying
            if target.is_file():
                return target
            partial = target.with_suffix(".partial")
            try:
                digest = _copy(source, partial)
            except OSError as error:
                with contextlib.suppress(OSError):
                    partial.unlink()
                warnings.warn(f"cannot stage {source} to {target}: {error}; reading it where it lies", stacklevel=2)
                return source
            if digest != self._segments[segment].digests["bin"]:
                partial.unlink()
                raise DataError(
                    f"its digest is {digest}, the manifest says {self._segments[segment].digests['bin']}",
                    file=source,
                    remedy="run data_tools/build_amber.py verify and build the segment again",
                )
            partial.replace(target)
            return target


def _copy(source: Path, target: Path) -> str:
    """Copies a file; returns its XXH3-128."""
    digest = new_digest()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with source.open("rb", buffering=0) as stream, target.open("wb") as copy:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while count := stream.readinto(buffer):
            copy.write(buffer[:count])
            digest.update(buffer[:count])
    return str(digest.hexdigest())
