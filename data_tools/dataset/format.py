"""The on-disk form of a data set of fixed-length rows: what every stage writes and what training reads.

A data set is one folder:

    segment_000.bin       rows of `row_length` token ids, uint16 little-endian, nothing between them
    segment_000.idx       index that Megatron-Core's `IndexedDataset` reads: one row = one sequence = one document
    segment_000.src       one byte a row: the position of its source in the manifest's `sources`
    segment_000.json      the segment's manifest; written last, so its presence says that the three files are whole
    ...
    held_out.*            optional: rows kept away from training, in the same files
    tokenizer.model|json  the tokenizer that made the ids
    manifest.json         the data set's manifest; written when every segment is there

More can be said about a row, in a file of its own with so many bytes a row, which readers of ids alone never open.
Conversations (data_tools/build_chat.py) are such rows:

    segment_000.mask      one bit an id: whether the loss of predicting it counts
    segment_000.starts    one bit an id: whether a conversation (or the padding after the last one) begins with it
    chat_template.jinja   the template that made the ids of the messages

Conversations about images (data_tools/build_vision.py) have what `dataset/images.py` says beside it.

Beside that and the files it is made of (`data_tools/files`) this module imports nothing else of the repository.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.dataset.images import IMAGES, ROW_IMAGES_DTYPE, ImagesRecord, ShardRecord
from data_tools.files.errors import DataError
from data_tools.files.json_file import fields_named, read_json, read_sealed, sealed
from data_tools.files.plain_file import open_plain

TOOL_VERSION = "1"
"""Raised whenever the same input would give other bytes; part of every manifest."""

AMBER_SOURCES = ("arxiv", "book", "c4", "refinedweb", "starcoderdata", "stackexchange", "wikipedia")
"""Amber's sources in the order of the paper's Table 2: those of a manifest that lists none of its own."""
MAX_SOURCES = 256  # a row's source is one byte
SOURCE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}")
"""A source's name is a folder's, stands in JSON as it is, and is typed at a shell."""

TABLE_2_BILLION_TOKENS = {
    "arxiv": 30.00,
    "book": 28.86,
    "c4": 197.67,
    "refinedweb": 665.01,
    "starcoderdata": 291.92,
    "stackexchange": 21.75,
    "wikipedia": 23.90,
}
"""Tokens a source gives to Amber, in billions (paper, Table 2)."""

ROW_LENGTH = 2049  # 2,048 inputs and one more label (paper, section 3.3)
VOCAB_SIZE = 32_000
NUM_SEGMENTS = 360
SEED = 11111  # the authors'
TOKEN_DTYPE = np.dtype("<u2")
MAX_VOCAB_SIZE = 1 << 16
MANIFEST_NAME = "manifest.json"
HELD_OUT_NAME = "held_out"
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model")

CHAT_TEMPLATE_NAME = "chat_template.jinja"
MARKS = ("mask", "starts")
"""Suffixes of the files that mark ids of a row; a data set has all of them or none."""

_IDX_MAGIC = b"MMIDIDX\x00\x00"
_IDX_VERSION = 1
_IDX_UINT16 = 8  # Megatron-Core's code for uint16
_IDX_HEADER = struct.Struct("<9sQBQQ")
_IDX_BLOCK_ROWS = 1 << 18


def segment_name(segment: int) -> str:
    """Name of a segment's files without suffix: `segment_007`."""
    return f"segment_{segment:03d}"


def bin_size(rows: int, row_length: int) -> int:
    """Bytes of a `.bin` of `rows` rows."""
    return rows * row_length * TOKEN_DTYPE.itemsize


def idx_size(rows: int) -> int:
    """Bytes of an `.idx` of `rows` rows: header, int32 length, int64 offset and int64 document bound a row."""
    return _IDX_HEADER.size + rows * (4 + 8) + (rows + 1) * 8


def marks_row_bytes(row_length: int) -> int:
    """Bytes that one row has in a file of marks: a bit an id, the lowest bit of a byte first, the last byte padded."""
    return -(-row_length // 8)


def pack_marks(marks: np.ndarray) -> np.ndarray:
    """Marks as they are stored: bool [..., row_length] to uint8 [..., marks_row_bytes(row_length)]."""
    return np.packbits(marks, axis=-1, bitorder="little")


def unpack_marks(stored: np.ndarray, row_length: int) -> np.ndarray:
    """The reverse of `pack_marks`: bool [..., row_length]."""
    return np.unpackbits(stored, axis=-1, count=row_length, bitorder="little").view(bool)


def index_blocks(rows: int, row_length: int) -> Iterator[bytes]:
    """The bytes of an `.idx` for `rows` rows of `row_length` ids each, in blocks of bounded size."""
    yield _IDX_HEADER.pack(_IDX_MAGIC, _IDX_VERSION, _IDX_UINT16, rows, rows + 1)

    def blocks(count: int) -> Iterator[np.ndarray]:
        for start in range(0, count, _IDX_BLOCK_ROWS):
            yield np.arange(start, min(start + _IDX_BLOCK_ROWS, count), dtype="<i8")

    for block in blocks(rows):
        yield np.full(len(block), row_length, dtype="<i4").tobytes()
    for block in blocks(rows):
        yield (block * (row_length * TOKEN_DTYPE.itemsize)).tobytes()
    for block in blocks(rows + 1):
        yield block.tobytes()


def read_index_rows(path: Path, row_length: int) -> int:
    """Number of rows that an `.idx` lists, from its header and its size alone.

    Raises:
        DataError: not an index of uint16 rows, or its size does not fit its row count.
    """
    with open_plain(path) as stream:
        header = stream.read(_IDX_HEADER.size)
    if len(header) < _IDX_HEADER.size:
        raise DataError("too short for an index", file=path, place="header", remedy="build the segment again")
    magic, version, code, rows, bounds = _IDX_HEADER.unpack(header)
    if (magic, version, code, bounds) != (_IDX_MAGIC, _IDX_VERSION, _IDX_UINT16, rows + 1):
        raise DataError(
            "not an index of uint16 rows with one document a row",
            file=path,
            place="header",
            remedy="build the segment again with data_tools/build_amber.py index",
        )
    if path.stat().st_size != idx_size(rows):
        raise DataError(
            f"{path.stat().st_size} bytes, but {rows} rows need {idx_size(rows)}",
            file=path,
            place="size",
            remedy="the file is cut short or damaged: build the segment again",
        )
    return int(rows)


@dataclass(frozen=True)
class TokenizerRecord:
    """Which tokenizer made the ids."""

    file: str
    sha256: str
    vocab_size: int


@dataclass(frozen=True)
class ChatRecord:
    """How the conversations of a data set became ids, and what became of them."""

    template_sha256: str
    """Of `chat_template.jinja`."""
    end_of_turn: str
    """The token that ends each answer."""
    end_of_turn_id: int
    conversations: int
    """In the training rows."""
    held_out_conversations: int
    counted: int
    """Ids of the training rows whose loss counts."""
    truncated: int
    dropped: int
    """Longer than a row, or repeated in the held-out rows."""
    files: list[str]
    """Names of the files that the conversations come from."""


@dataclass(frozen=True)
class SegmentManifest:
    """What one segment (or the held-out rows) holds; `segment_000.json`."""

    name: str
    rows: int
    row_length: int
    vocab_size: int
    rows_per_source: dict[str, int]
    rejected: int
    input: dict[str, Any]
    """What it was made from: file name, bytes and XXH3-128 of a JSONL segment, or the digest of the mixed rows."""
    digests: dict[str, str]
    """XXH3-128 by suffix: bin, idx, src, those of MARKS where the rows are marked, images where they have some."""
    sources: tuple[str, ...] = AMBER_SOURCES
    """What the bytes of `.src` are positions in; in the file only where it is not Amber's list."""
    images_per_row: int = 0
    """Images that a row can point to; in the file only where it is not 0."""
    tool_version: str = TOOL_VERSION

    @property
    def tokens(self) -> int:
        return self.rows * self.row_length

    @property
    def is_marked(self) -> bool:
        """Whether the rows have marks."""
        return set(MARKS) <= set(self.digests)

    def sizes(self) -> dict[str, int]:
        """Bytes of each of its files, by suffix."""
        sizes = {"bin": bin_size(self.rows, self.row_length), "idx": idx_size(self.rows), "src": self.rows}
        if self.images_per_row:
            sizes[IMAGES] = self.rows * self.images_per_row * ROW_IMAGES_DTYPE.itemsize
        return sizes | dict.fromkeys(MARKS if self.is_marked else (), self.rows * marks_row_bytes(self.row_length))

    def to_json(self) -> dict[str, Any]:
        value = {**asdict(self), "tokens": self.tokens}
        if self.sources == AMBER_SOURCES:
            del value["sources"]
        if not self.images_per_row:
            del value["images_per_row"]
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any], file: Path) -> SegmentManifest:
        """Raises DataError where a field is missing or has the wrong type."""
        sources = checked_sources(value.get("sources", AMBER_SOURCES), file)
        names = [field.name for field in fields(cls) if field.name not in ("sources", "images_per_row")]
        per_row = value.get("images_per_row", 0)
        try:
            manifest = cls(**{name: value[name] for name in names}, sources=sources, images_per_row=per_row)
        except KeyError as error:
            raise DataError(
                f"field {error} is missing", file=file, remedy="not a segment's manifest: build it again"
            ) from None
        numbers = (manifest.rows, manifest.row_length, manifest.vocab_size, manifest.rejected, per_row)
        counts = manifest.rows_per_source
        sound = isinstance(counts, dict) and isinstance(manifest.input, dict) and isinstance(manifest.digests, dict)
        if not sound or not all(type(n) is int and n >= 0 for n in (*numbers, *counts.values())):
            raise DataError("a field has the wrong type", file=file, remedy="build the segment again")
        if set(counts) - set(sources) or sum(counts.values()) != manifest.rows:
            raise DataError(
                f"rows per source {counts} do not add up to {manifest.rows} rows of {', '.join(sources)}",
                file=file,
                remedy="build the segment again",
            )
        plain, pictures = {"bin", "idx", "src"}, {IMAGES} if per_row else set()
        if set(manifest.digests) not in (plain, plain | {*MARKS} | pictures, {"jsonl"}):
            raise DataError(f"digests of {sorted(manifest.digests)}", file=file, remedy="build the segment again")
        return manifest

    @classmethod
    def read(cls, path: Path) -> SegmentManifest:
        """Raises DataError where the file is missing or is not a segment's manifest."""
        return cls.from_json(read_json(path, "build the segment with data_tools/build_amber.py"), path)


@dataclass(frozen=True)
class DatasetManifest:
    """What the whole data set holds; `manifest.json`. Written when every segment is there."""

    num_segments: int
    rows_per_segment: int
    row_length: int
    vocab_size: int
    rows_per_source: dict[str, int]
    dropped_rows: int
    """Rows beyond the last full round of segments, in no segment."""
    rejected: int
    tokenizer: TokenizerRecord | None
    segments: list[SegmentManifest]
    held_out: SegmentManifest | None
    sources: tuple[str, ...] = AMBER_SOURCES
    """The sources in their order: a byte of a segment's `.src` is a position in it."""
    chat: ChatRecord | None = None
    images: ImagesRecord | None = None
    tool_version: str = TOOL_VERSION

    @property
    def rows(self) -> int:
        return self.num_segments * self.rows_per_segment

    @property
    def images_in_a_row(self) -> float:
        """On average; 0 where rows have none."""
        return 0.0 if self.images is None else self.images.count / self.rows

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest's content: names the data set."""
        return str(self.to_json()["digest"])

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        value["segments"] = [segment.to_json() for segment in self.segments]
        value["held_out"] = self.held_out.to_json() if self.held_out else None
        value["rows"] = self.rows
        value["tokens"] = self.rows * self.row_length
        value["sources"] = list(self.sources)
        if self.chat is None:  # the digest of a data set of documents is that of before there were others
            del value["chat"]
        if self.images is None:
            del value["images"]
        return sealed(value)

    @classmethod
    def read(cls, path: Path) -> DatasetManifest:
        """Raises DataError where the file is missing, damaged or of another form."""
        remedy = "finish the data set with data_tools/build_amber.py (index or mix --direct, then merge)"
        value = read_sealed(path, remedy)
        with fields_named(path, remedy):
            dataset = cls(
                num_segments=value["num_segments"],
                rows_per_segment=value["rows_per_segment"],
                row_length=value["row_length"],
                vocab_size=value["vocab_size"],
                rows_per_source=value["rows_per_source"],
                dropped_rows=value["dropped_rows"],
                rejected=value["rejected"],
                tokenizer=TokenizerRecord(**value["tokenizer"]) if value["tokenizer"] else None,
                segments=[SegmentManifest.from_json(segment, path) for segment in value["segments"]],
                held_out=SegmentManifest.from_json(value["held_out"], path) if value["held_out"] else None,
                sources=checked_sources(value["sources"], path),
                chat=ChatRecord(**value["chat"]) if "chat" in value else None,
                images=_images(value["images"]) if "images" in value else None,
                tool_version=value["tool_version"],
            )
        segments = dataset.segments
        for segment in (*segments, *filter(None, [dataset.held_out])):
            check_same_sources(segment, dataset.sources, path)
        found = len(segments), {segment.rows for segment in segments}, total_per_source(segments, dataset.sources)
        if found != (dataset.num_segments, {dataset.rows_per_segment}, dataset.rows_per_source):
            raise DataError("its numbers are not those of its segments", file=path, remedy=remedy)
        return dataset


def _images(value: dict[str, Any]) -> ImagesRecord:
    return ImagesRecord(**{**value, "shards": [ShardRecord(**shard) for shard in value["shards"]]})


def checked_sources(names: Any, file: Path) -> tuple[str, ...]:
    """A list of sources as read from `file`, in its order.

    Raises:
        DataError: not a list of 1 to 256 different names that `SOURCE_NAME` allows.
    """
    listed = list(names) if isinstance(names, (list, tuple)) else []
    remedy = "a source's name is 1 to 64 letters, digits, _ . + -, and each stands once"
    if not 1 <= len(listed) <= MAX_SOURCES:
        raise DataError(f"not a list of 1 to {MAX_SOURCES} sources", file=file, place="sources", remedy=remedy)
    for position, name in enumerate(listed):
        if not isinstance(name, str) or not SOURCE_NAME.fullmatch(name) or name in listed[:position]:
            raise DataError(f"{name!r} is no source's name, or stands twice", file=file, place="sources", remedy=remedy)
    return tuple(listed)


def check_same_sources(segment: SegmentManifest, sources: tuple[str, ...], file: Path) -> None:
    """Raises DataError where a segment's source bytes are positions in another list than `sources`."""
    if segment.sources != sources:
        raise DataError(
            f"{segment.name} was built with the sources {', '.join(segment.sources)}, not {', '.join(sources)}",
            file=file,
            place="sources",
            remedy="build every segment with the same --config",
        )


def total_per_source(segments: Sequence[SegmentManifest], sources: tuple[str, ...]) -> dict[str, int]:
    """Rows of all segments by source, in the order of `sources`; sources without rows are left out."""
    totals = {name: sum(segment.rows_per_source.get(name, 0) for segment in segments) for name in sources}
    return {name: total for name, total in totals.items() if total}


def tokenizer_name(path: Path) -> str:
    """The name that a tokenizer file has in a data set, whatever it is called where it comes from."""
    return "tokenizer.model" if path.suffix == ".model" else "tokenizer.json"


def tokenizer_in(folder: Path) -> Path | None:
    """The tokenizer file of a folder, if it has one; `tokenizer.json` before `tokenizer.model`."""
    return next((folder / name for name in TOKENIZER_NAMES if (folder / name).is_file()), None)
