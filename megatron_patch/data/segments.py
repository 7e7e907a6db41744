"""A data set's rows by segment and row number, refused at the start where it does not fit the model."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from data_tools.dataset.format import (
    HELD_OUT_NAME,
    MANIFEST_NAME,
    MARKS,
    TOKEN_DTYPE,
    DatasetManifest,
    SegmentManifest,
    marks_row_bytes,
    read_index_rows,
    segment_name,
    unpack_marks,
)
from data_tools.dataset.images import IMAGES, ROW_IMAGES_DTYPE
from data_tools.files.digest import sha256_file
from data_tools.files.errors import DataError
from data_tools.files.plain_file import file_size
from megatron_patch.data.ahead import Ahead
from megatron_patch.data.marks import Marks

__all__ = ["DataError", "Segments", "open_segments"]


def open_segments(
    folder: Path,
    *,
    row_length: int,
    vocab_size: int,
    read_ahead: bool = False,
    stage_folder: Path | None = None,
    again: bool = False,
) -> Segments:
    """Opens a data set without reading its rows.

    Args:
        folder: what `data_tools/build_amber.py` wrote (data_tools/dataset/format.py).
        row_length: ids a row that the model wants: sequence length + 1.
        vocab_size: the model's vocabulary.
        read_ahead: read each segment through, front to back, before its rows are asked for (ahead.py).
        stage_folder: copy each segment there first: storage of the node, with room for two segments (ahead.py).
        again: the segments are read more than once, one after the other.

    Raises:
        DataError: a file is missing, has the wrong size or disagrees with the manifest; rows of another length; ids
            beyond the model's vocabulary; nothing can be written to `stage_folder`.
    """
    manifest_path = folder / MANIFEST_NAME
    manifest = DatasetManifest.read(manifest_path)
    if manifest.row_length != row_length:
        raise DataError(
            f"rows of {manifest.row_length} ids, but a sequence length of {row_length - 1} needs {row_length}",
            file=manifest_path,
            place="row_length",
            remedy=f"set the sequence length to {manifest.row_length - 1} or build with --row-length {row_length}",
        )
    if manifest.vocab_size > vocab_size:
        raise DataError(
            f"a vocabulary of {manifest.vocab_size}, but the model has {vocab_size}",
            file=manifest_path,
            place="vocab_size",
            remedy=f"set the model's vocabulary to {manifest.vocab_size}",
        )
    if manifest.rows_per_segment < 1:
        raise DataError(
            f"{manifest.num_segments} segments without a row",
            file=manifest_path,
            place="segments",
            remedy="merge the data set again with data_tools/build_amber.py merge",
        )
    for number, segment in enumerate(manifest.segments):
        _check_segment(folder / segment_name(number), segment, manifest)
    if manifest.held_out is not None:
        _check_segment(folder / HELD_OUT_NAME, manifest.held_out, manifest)
    if manifest.tokenizer is not None:
        tokenizer = folder / manifest.tokenizer.file
        file_size(tokenizer)
        if sha256_file(tokenizer) != manifest.tokenizer.sha256:
            raise DataError("not the tokenizer that made the data", file=tokenizer, remedy="copy the right one back")
    ahead = Ahead(folder, manifest.segments, read=read_ahead, stage_folder=stage_folder, again=again)
    return Segments(folder, manifest, ahead)


def _check_segment(base: Path, segment: SegmentManifest, manifest: DatasetManifest) -> None:
    if (segment.row_length, segment.vocab_size) != (manifest.row_length, manifest.vocab_size):
        raise DataError(
            f"row length {segment.row_length} and vocabulary {segment.vocab_size} differ from the data set's",
            file=base.with_suffix(".json"),
            remedy="build the segment again",
        )
    if segment.is_marked != manifest.segments[0].is_marked:
        raise DataError(
            f"{'has' if segment.is_marked else 'lacks'} marks of its rows, unlike {manifest.segments[0].name}",
            file=base.with_suffix(".json"),
            remedy="build the data set again with one tool",
        )
    for suffix, size in segment.sizes().items():
        if suffix == "idx":  # its header says more than its size
            continue
        path = base.with_suffix(f".{suffix}")
        if (actual := file_size(path)) != size:
            raise DataError(
                f"{actual} bytes, but the manifest's {segment.rows} rows need {size}",
                file=path,
                place="size",
                remedy="the file was cut short or replaced: build or fetch the segment again, then verify",
            )
    index = base.with_suffix(".idx")
    file_size(index)
    if (rows := read_index_rows(index, segment.row_length)) != segment.rows:
        raise DataError(
            f"has {rows} rows, the manifest lists {segment.rows}", file=index, remedy="build the segment again"
        )


class Segments:
    """An opened data set.

    Attributes:
        folder: where it lies.
        digest: names its content (digest of the manifest).
        num_segments, rows_per_segment, held_out_rows, row_length, vocab_size: its shape.
        is_marked: whether its rows have marks beside their ids (marks.py).
        tokenizer_path: the tokenizer that made it; None where the data set came without one.
    """

    def __init__(self, folder: Path, manifest: DatasetManifest, ahead: Ahead) -> None:
        self.folder = folder
        self.manifest = manifest
        self.digest = manifest.digest
        self.num_segments = manifest.num_segments
        self.rows_per_segment = manifest.rows_per_segment
        self.row_length = manifest.row_length
        self.vocab_size = manifest.vocab_size
        self.held_out_rows = manifest.held_out.rows if manifest.held_out else 0
        self.is_marked = manifest.segments[0].is_marked
        self.tokenizer_path = folder / manifest.tokenizer.file if manifest.tokenizer else None
        self._ahead = ahead
        self._mapped: tuple[int, dict[str, np.ndarray]] | None = None

    def read(self, segment: int, rows: np.ndarray) -> np.ndarray:
        """Rows of a segment by number.

        Args:
            segment: 0 <= segment < num_segments.
            rows: int64 [n], each in [0, rows_per_segment).

        Returns:
            uint16 [n, row_length].

        Raises:
            DataError: an id beyond the data set's vocabulary: the file is damaged.
        """
        return self._checked(segment_name(segment), rows, self._segment(segment)["bin"][rows])

    def read_held_out(self, rows: np.ndarray) -> np.ndarray:
        """Held-out rows by number: uint16 [n, row_length]."""
        return self._checked(HELD_OUT_NAME, rows, self._map(self._held_out("bin"))[rows])

    def marks(self, segment: int, rows: np.ndarray) -> Marks | None:
        """Marks of rows of a segment by number; None where the data set has none.

        Raises:
            DataError: marks that the data tools never write: the file is damaged.
        """
        return self._marks(segment_name(segment), self._segment(segment), rows) if self.is_marked else None

    def held_out_marks(self, rows: np.ndarray) -> Marks | None:
        """The same of held-out rows."""
        if not self.is_marked:
            return None
        suffixes = (*MARKS, *((IMAGES,) if self.manifest.images else ()))
        return self._marks(HELD_OUT_NAME, {suffix: self._map(self._held_out(suffix)) for suffix in suffixes}, rows)

    def _held_out(self, suffix: str) -> Path:
        return self.folder / f"{HELD_OUT_NAME}.{suffix}"

    def _marks(self, name: str, mapped: dict[str, np.ndarray], rows: np.ndarray) -> Marks:
        counted, starts = (unpack_marks(mapped[suffix][rows], self.row_length) for suffix in MARKS)
        marks = Marks(counted, starts, self._row_images(name, mapped, rows))
        bad = ~(marks.starts[:, 0] & marks.counted[:, 1:].any(axis=1))
        if bad.any():
            raise DataError(
                "begins with no conversation, or no id of it counts",
                file=self.folder / f"{name}.mask",
                place=f"row {rows[bad.argmax()]}",
                remedy="the file is damaged: run data_tools/build_chat.py verify and build the data set again",
            )
        return marks

    def _row_images(self, name: str, mapped: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray | None:
        """Raises DataError where a row points to an image that there is not."""
        record = self.manifest.images
        if record is None:
            return None
        images = mapped[IMAGES][rows]
        bad = ((images < -1) | (images >= record.count)).any(axis=1)
        if bad.any():
            raise DataError(
                f"points to an image that is none of the {record.count}",
                file=self.folder / f"{name}.{IMAGES}",
                place=f"row {rows[bad.argmax()]}",
                remedy="the file is damaged: run data_tools/build_vision.py verify and build the data set again",
            )
        return images

    def sources(self, segment: int, rows: np.ndarray) -> np.ndarray:
        """Source codes (positions in the manifest's `sources`) of rows of a segment: uint8 [n]."""
        path = self.folder / f"{segment_name(segment)}.src"
        return np.memmap(path, dtype=np.uint8, mode="r", shape=(self.rows_per_segment,))[rows]

    def _checked(self, name: str, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """`tokens` as read; an embedding look-up must never meet an id that it has no row for."""
        if tokens.size and tokens.max() >= self.vocab_size:
            i, j = np.unravel_index(tokens.argmax(), tokens.shape)
            raise DataError(
                f"id {tokens[i, j]} is beyond the vocabulary of {self.vocab_size}",
                file=self.folder / f"{name}.bin",
                place=f"row {rows[i]}, position {j}",
                remedy="the file is damaged: run data_tools/build_amber.py verify and build the segment again",
            )
        return tokens

    def close(self) -> None:
        """Ends the reading ahead."""
        self._ahead.close()

    def _segment(self, segment: int) -> dict[str, np.ndarray]:
        """The files of a segment by suffix. One is mapped at a time: rows are read segment after segment."""
        mapped = self._mapped  # threads of several loaders read from different segments
        if mapped is None or mapped[0] != segment:
            files = self._ahead.files(segment)
            mapped = self._mapped = (segment, {suffix: self._map(path) for suffix, path in files.items()})
        return mapped[1]

    def _map(self, path: Path) -> np.ndarray:
        """[rows, row_length] ids, the numbers of each row's images, or what one of MARKS stores of each row."""
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        # Rows are asked for at random: the kernel's own reading ahead would bring 32 times what is wanted.
        mapped.madvise(mmap.MADV_RANDOM)
        if path.suffix == ".bin":
            return np.frombuffer(mapped, dtype=TOKEN_DTYPE).reshape(-1, self.row_length)
        if path.suffix == f".{IMAGES}" and self.manifest.images is not None:
            return np.frombuffer(mapped, dtype=ROW_IMAGES_DTYPE).reshape(-1, self.manifest.images.per_row)
        return np.frombuffer(mapped, dtype=np.uint8).reshape(-1, marks_row_bytes(self.row_length))
