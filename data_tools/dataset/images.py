"""The on-disk form of the images that rows point to.

images_00000.tar    a webdataset shard: NUMBER.jpg (png, ...), an image as it was encoded, and NUMBER.json, where it
                    comes from; numbers count on from shard to shard
...
images.index        where each image lies, by its number: `INDEX_DTYPE`
segment_000.images  of each row the numbers of its images in their order: int32, -1 where there is none
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.files.digest import digest_file
from data_tools.files.errors import DataError
from data_tools.files.plain_file import file_size

IMAGES = "images"
"""Suffix of the file that says which images a row has, and of what the data set calls them."""
IMAGES_INDEX_NAME = "images.index"
ROW_IMAGES_DTYPE = np.dtype("<i4")
INDEX_DTYPE = np.dtype([("shard", "<u4"), ("bytes", "<u4"), ("offset", "<u8"), ("crc32", "<u4")])
_REMEDY = "the file was cut short, replaced or damaged: verify, then copy it back or build the data set again"


def shard_name(shard: int) -> str:
    return f"images_{shard:05d}.tar"


@dataclass(frozen=True)
class ShardRecord:
    """One shard."""

    name: str
    images: int
    bytes: int
    digest: str
    """XXH3-128."""


@dataclass(frozen=True)
class ImagesRecord:
    """Which images a data set has, and how its rows point to them."""

    count: int
    tokens: int
    """Placeholders that stand for one image."""
    placeholder_id: int
    placeholder: str
    """The tokenizer's text of that id."""
    per_row: int
    """Most images that a row can hold."""
    index_digest: str
    """XXH3-128 of `images.index`."""
    shards: list[ShardRecord]


def images_per_row(row_length: int, tokens: int) -> int:
    """Most images of so many placeholders that fit into a row."""
    return row_length // tokens


def read_images_index(folder: Path, record: ImagesRecord) -> np.ndarray:
    """Where each image lies: `INDEX_DTYPE` [count].

    Raises:
        DataError: index or shards are missing or have another size than the manifest says, or the index is damaged.
    """
    path = folder / IMAGES_INDEX_NAME
    for file, size in [
        (path, record.count * INDEX_DTYPE.itemsize),
        *((folder / s.name, s.bytes) for s in record.shards),
    ]:
        if (actual := file_size(file)) != size:
            raise DataError(f"{actual} bytes, the manifest says {size}", file=file, place="size", remedy=_REMEDY)
    if digest_file(path) != record.index_digest:
        raise DataError("its digest is not the manifest's", file=path, remedy=_REMEDY)
    return np.fromfile(path, dtype=INDEX_DTYPE)


def read_image(folder: Path, record: ImagesRecord, index: np.ndarray, number: int) -> bytes:
    """An image as it was encoded.

    Raises:
        DataError: the bytes are not those that were written.
    """
    place = index[number]
    path = folder / record.shards[place["shard"]].name
    with path.open("rb") as stream:
        stream.seek(int(place["offset"]))
        content = stream.read(int(place["bytes"]))
    if zlib.crc32(content) != place["crc32"]:
        raise DataError("not the bytes that were written", file=path, place=f"image {number}", remedy=_REMEDY)
    return content
