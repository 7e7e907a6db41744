"""Images of a data set by their numbers, decoded and prepared by threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_tools.dataset.format import DatasetManifest
from data_tools.dataset.images import read_image, read_images_index
from data_tools.files.errors import DataError
from data_tools.vision.pictures import BadPicture, Fit, prepare, read_picture

_MOST_THREADS = 8


class Images:
    """The images of an opened data set, as an encoder of squares of `size` pixels takes them."""

    def __init__(self, folder: Path, manifest: DatasetManifest, size: int, fit: Fit) -> None:
        """Raises DataError where index or shards are not those of the manifest."""
        assert manifest.images is not None
        self._folder, self._record, self._size, self._fit = folder, manifest.images, size, fit
        self._index = read_images_index(folder, manifest.images)
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // ranks))
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="images")  # decoders let go of Python's lock

    def of_rows(self, tokens: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """The images of rows [b, row_length] whose numbers are [b, images a row], one row's after the other's.

        Raises DataError where a row has other than its images' placeholders.
        """
        placeholders = (tokens[:, :-1] == self._record.placeholder_id).sum(axis=1)
        if (placeholders != self._record.tokens * (numbers >= 0).sum(axis=1)).any():
            raise DataError(
                f"a row has other than {self._record.tokens} placeholders for each of its images",
                file=self._folder,
                remedy="the files are damaged: run data_tools/build_vision.py verify and build the data set again",
            )
        return self.read(numbers[numbers >= 0].tolist())

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """uint8 [n, 3, size, size]. Raises DataError where an image is not as it was written."""
        pixels = np.empty((len(numbers), 3, self._size, self._size), dtype=np.uint8)
        for place, image in enumerate(self._threads.map(self._one, numbers)):
            pixels[place] = image
        return pixels

    def _one(self, number: int) -> np.ndarray:
        content = read_image(self._folder, self._record, self._index, number)
        try:
            return prepare(read_picture(content)[0], self._size, self._fit)
        except BadPicture as error:  # another version of the decoder, say
            shard = self._record.shards[self._index[number]["shard"]].name
            raise DataError(
                f"cannot be decoded here, and could where the data set was built: {error}",
                file=self._folder / shard,
                place=f"image {number}",
                remedy="install the versions of constraints.txt, or build the data set again",
            ) from None

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(cancel_futures=True)
