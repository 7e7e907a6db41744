"""Prefetches or stages a segment before its rows are read: small random reads are poison to a parallel file system.

Either a segment's files, ids and marks, are copied, whole and checked, to storage of the node (`stage_folder`) by
whichever of its ranks comes first; or they are read through once, front to back, so that the page cache holds them. The
segment after the one in use is brought by a thread meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from data_tools.dataset.format import MARKS, SegmentManifest
from data_tools.dataset.images import IMAGES
from data_tools.files.digest import new_digest
from data_tools.files.errors import DataError

BLOCK_BYTES = 1 << 23


class Ahead:
    """Where to read a segment's files from, and the prefetch of the next one.

    Attributes:
        suffixes: of the files that rows are read from.
    """

    def __init__(
        self, folder: Path, segments: list[SegmentManifest], *, read: bool, stage_folder: Path | None, again: bool
    ) -> None:
        """`again`: after the last segment comes the first. Raises DataError where `stage_folder` cannot be written."""
        self._folder, self._segments, self._read, self._again = folder, segments, read, again
        self._stage_folder = stage_folder
        said = (*(MARKS if segments[0].is_marked else ()), *((IMAGES,) if segments[0].images_per_row else ()))
        self.suffixes = ("bin", *said)
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
        self._coming: dict[int, Future[dict[str, Path]]] = {}

    def files(self, segment: int) -> dict[str, Path]:
        """The files to read a segment from, by suffix; waits for their staging, and starts on the segment after it."""
        if self._stage_folder is None and not self._read:
            return self._sources(segment)
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
            return self._sources(segment)  # rows can be read while the rest of the segment is still coming
        files = coming.result()
        before = (segment - 1) % len(self._segments)
        if (segment or self._again) and before not in (segment, following):
            # Ranks that still read the segment before have it mapped, which outlives its name.
            for suffix in self.suffixes:
                self._staged(before, suffix).unlink(missing_ok=True)
        return files

    def close(self) -> None:
        """Ends the thread; what is being fetched is finished first."""
        self._thread.shutdown(cancel_futures=True)

    def _bring(self, segment: int) -> None:
        if segment not in self._coming:
            work = self._read_through if self._stage_folder is None else self._stage
            self._coming[segment] = self._thread.submit(work, segment)

    def _source(self, segment: int, suffix: str) -> Path:
        return self._folder / f"{self._segments[segment].name}.{suffix}"

    def _sources(self, segment: int) -> dict[str, Path]:
        return {suffix: self._source(segment, suffix) for suffix in self.suffixes}

    def _staged(self, segment: int, suffix: str) -> Path:
        assert self._stage_folder is not None
        # The digest in the name: a file left by a job with other data is another file.
        record = self._segments[segment]
        return self._stage_folder / f"{record.name}-{record.digests[suffix]}.{suffix}"

    def _read_through(self, segment: int) -> dict[str, Path]:
        files = self._sources(segment)
        buffer = bytearray(BLOCK_BYTES)
        for path in files.values():
            with path.open("rb", buffering=0) as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                while stream.readinto(buffer):
                    pass
        return files

    def _stage(self, segment: int) -> dict[str, Path]:
        return {suffix: self._stage_file(segment, suffix) for suffix in self.suffixes}

    def _stage_file(self, segment: int, suffix: str) -> Path:
        """Copies a file unless another process of the node has; without room, the data set's own is read.

        Raises:
            DataError: the bytes are not those of the manifest.
        """
        source, target, expected = (
            self._source(segment, suffix),
            self._staged(segment, suffix),
            self._segments[segment].digests[suffix],
        )
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
            if digest != expected:
                partial.unlink()
                raise DataError(
                    f"its digest is {digest}, the manifest says {expected}",
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
