"""Writes images, as they are encoded, into a webdataset shard: a tar of NUMBER.jpg and NUMBER.json."""

from __future__ import annotations

import io
import tarfile
import zlib
from typing import BinaryIO

import numpy as np

from data_tools.dataset.images import INDEX_DTYPE
from data_tools.files.json_file import canonical_json


class ShardWriter:
    """One shard, its bytes a function of the images alone."""

    def __init__(self, stream: BinaryIO, shard: int) -> None:
        self._tar = tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - see `finish`
        self._shard = shard
        self._places: list[tuple[int, int, int, int]] = []

    def add(self, number: int, suffix: str, content: bytes, source: str) -> None:
        """An image and where it comes from."""
        name = f"{number:09d}"
        member = self._put(f"{name}.{suffix}", content)
        self._put(f"{name}.json", canonical_json({"image": source}))
        self._places.append((self._shard, len(content), member + tarfile.BLOCKSIZE, zlib.crc32(content)))

    def finish(self) -> np.ndarray:
        """Ends the shard; where its images lie: `INDEX_DTYPE` [images]."""
        self._tar.close()
        return np.array(self._places, dtype=INDEX_DTYPE)

    def _put(self, name: str, content: bytes) -> int:
        """Where the member's header begins. A name so short has a header of one block."""
        at = self._tar.offset
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))
        return at
