"""`verify` of images: the shards are what was written, and every row's placeholders are those of its images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.dataset.format import TOKEN_DTYPE, DatasetManifest, SegmentManifest
from data_tools.dataset.images import IMAGES, ROW_IMAGES_DTYPE, ImagesRecord, read_image, read_images_index
from data_tools.files.digest import digest_file
from data_tools.files.errors import DataError
from data_tools.index.row_blocks import FirstRows, row_blocks

_REMEDY = "remove the data set's segments and parts and build it again"


def shard_faults(folder: Path, record: ImagesRecord) -> Iterator[str]:
    """What is wrong with the shards or their index."""
    try:
        index = read_images_index(folder, record)
    except DataError as error:
        yield str(error)
        return
    damaged = {s.name for s in record.shards if digest_file(folder / s.name) != s.digest}
    for name in sorted(damaged):
        yield f"{folder / name}: its digest is not the manifest's\n  remedy: {_REMEDY}"
    for number in range(len(index)):
        if index[number]["shard"] >= len(record.shards):
            yield f"{folder}: image {number} lies in no shard\n  remedy: {_REMEDY}"
        elif record.shards[index[number]["shard"]].name in damaged:
            try:
                read_image(folder, record, index, number)
            except DataError as error:
                yield str(error)


def row_faults(base: Path, record: SegmentManifest, dataset: DatasetManifest) -> Iterator[str]:
    """Of a segment: images that there are not, or another number than its placeholders stand for."""
    images = dataset.images
    assert images is not None
    path = base.with_suffix(f".{IMAGES}")
    if digest_file(path) != record.digests[IMAGES]:
        yield f"{path}: its digest is not the manifest's\n  remedy: {_REMEDY}"
    first = FirstRows(_REMEDY)
    files = (
        (path, record.images_per_row, ROW_IMAGES_DTYPE),
        (base.with_suffix(".bin"), record.row_length, TOKEN_DTYPE),
    )
    for start, (numbers, ids) in row_blocks(record.rows, *files):
        first.note(
            start,
            (path, ((numbers < -1) | (numbers >= images.count)).any(axis=1), "an image that there is not"),
            (
                path,
                (np.diff((numbers >= 0).astype(int), axis=1) > 0).any(axis=1),
                "an image behind a place without one",
            ),
            (
                path,
                (ids == images.placeholder_id).sum(axis=1) != images.tokens * (numbers >= 0).sum(axis=1),
                f"other than {images.tokens} placeholders for each of its images",
            ),
        )
    yield from first.faults()
