"""LLaVA's conversations and a folder of images -> ids and shards, a part of `PART` entries each, kept until the build.

images_00000.tar                  the images that the part's conversations are the first to name
parts/part_00000.npz              ids, marks, lengths and images of its conversations; where its images lie
parts/part_00000.rejected.jsonl   bad conversations and those of bad images, where there are some
parts/part_00000.json             the part's manifest; written last
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import orjson

from data_tools.chat.conversations import Line
from data_tools.chat.workers import Workers
from data_tools.dataset.format import TOOL_VERSION
from data_tools.dataset.images import INDEX_DTYPE, ROW_IMAGES_DTYPE, ShardRecord, shard_name
from data_tools.files.digest import digest_file, new_digest
from data_tools.files.durable import unchanged, write_beside, write_whole
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.files.json_file import canonical_json, read_sealed, sealed
from data_tools.files.plain_file import open_plain
from data_tools.files.progress import Progress
from data_tools.sources.documents import Document, rejected_line
from data_tools.vision.conversations import asked_of, read_entries
from data_tools.vision.pictures import MOST_BYTES, BadPicture, read_picture
from data_tools.vision.placeholders import ImageTokenizer
from data_tools.vision.shards import ShardWriter

PARTS = "parts"
PART = 5_000
_ARRAYS = ("ids", "counted", "lengths", "images", "image_counts", "places")
_TEXTS, _PICTURES, _PICTURE_BYTES = 128, 16, MOST_BYTES  # for a process at a time
_In = TypeVar("_In")


@dataclass(frozen=True)
class Reading:
    """How the file is read."""

    file: Path
    images: Path
    tokenizer: Path
    template: Path
    vocab_size: int | None
    placeholder: str
    tokens: int
    identity: dict[str, Any]
    """Names all that decides a part's bytes."""
    policy: ErrorPolicy
    workers: int
    part: int = PART


class Part(NamedTuple):
    """What became of `PART` entries."""

    ids: np.ndarray
    counted: np.ndarray
    lengths: np.ndarray
    """int64 [conversations]."""
    images: np.ndarray
    """int32: the numbers of the images of all its conversations, one after the other."""
    image_counts: np.ndarray
    """int64 [conversations]."""
    places: np.ndarray
    """`INDEX_DTYPE` of its own images."""
    sources: list[str]
    """Their paths."""
    rejected: int
    digest: str
    """Of the part's content."""
    shard: ShardRecord


class Picture(NamedTuple):
    """An image as a worker has read it."""

    content: bytes
    suffix: str
    reason: str = ""
    """Why it is not trained on; empty where it is."""


class Text(NamedTuple):
    """A conversation as a worker has read it."""

    ids: np.ndarray
    counted: np.ndarray
    images: list[str]
    reason: str = ""


class _Worker:
    def __init__(self, reading: Reading) -> None:
        self._folder = reading.images
        arguments = reading.tokenizer, reading.template, reading.vocab_size, reading.placeholder, reading.tokens
        self._tokenizer = ImageTokenizer(*arguments)

    def texts(self, lines: list[Line]) -> list[Text]:
        return [self._text(line) for line in lines]

    def pictures(self, paths: list[str]) -> list[Picture]:
        return [self._picture(path) for path in paths]

    def _text(self, line: Line) -> Text:
        nothing = np.zeros(0, dtype="<u2"), np.zeros(0, dtype=bool)
        try:
            if line.reason:
                raise ValueError(line.reason)
            asked = asked_of(line.value)
            return Text(*self._tokenizer.encode(asked), asked.images)
        except ValueError as error:
            return Text(*nothing, [], str(error))

    def _picture(self, path: str) -> Picture:
        try:
            with open_plain(self._folder / path) as stream:
                content = stream.read(MOST_BYTES + 1)
            return Picture(content, read_picture(content)[1])
        except OSError as error:
            return Picture(b"", "", error.strerror or str(error))
        except BadPicture as error:
            return Picture(b"", "", str(error))


def read_parts(output: Path, reading: Reading) -> list[Part]:
    """All parts; those that an earlier run finished are not read again.

    Raises:
        DataError: a bad conversation or image under the policy `stop`, or too many; the file cannot be read; a part
            made from other input or with other options.
    """
    folder = output / PARTS
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Part] = []
    known: dict[str, int] = {}  # images that have a number already
    file_digest = digest_file(reading.file)
    with ExitStack() as stack:
        stack.enter_context(unchanged(reading.file, reading.file.stat().st_size))
        in_order = stack.enter_context(Workers(reading.workers, _Worker, reading))
        entries = list(read_entries(reading.file, new_digest()))
        progress = stack.enter_context(Progress("conversations", len(entries), ""))
        for number, lines in enumerate(_batches(entries, reading.part)):
            base, shard = folder / f"part_{number:05d}", output / shard_name(number)
            expected = {"number": number, "entries": len(lines), "input": file_digest, **reading.identity}
            if not base.with_suffix(".json").is_file():
                _write(base, shard, lines, reading, expected, known, in_order)
            part = _finished(base, shard, expected)
            known.update((path, len(known) + i) for i, path in enumerate(part.sources))
            parts.append(part)
            progress.advance(len(lines))
    if extra := sorted(folder.glob("part_*.json"))[len(parts) :]:
        raise DataError(
            f"is there, but the input has {len(parts)} parts",
            file=extra[0],
            remedy="use another --output, or remove the folder",
        )
    return parts


def _finished(base: Path, shard: Path, expected: dict[str, Any]) -> Part:
    path = base.with_suffix(".json")
    record = read_sealed(path, f"remove {base.name}.json to read that part again")
    if {key: record.get(key) for key in expected} != expected:
        raise DataError(
            "made from other input, or with other options",
            file=path,
            remedy="use another --output, or remove the folder",
        )
    content = base.with_suffix(".npz")
    for file, digest in ((content, record["content"]), (shard, record["shard"]["digest"])):
        if not file.is_file() or digest_file(file) != digest:
            raise DataError("missing or not as its manifest says", file=file, remedy=f"remove {path} and build again")
    with np.load(content, allow_pickle=False) as arrays:
        fields = {name: arrays[name] for name in _ARRAYS}
    rest = record["sources"], int(record["rejected"]), str(record["content"]), ShardRecord(**record["shard"])
    return Part(**fields, **dict(zip(Part._fields[len(_ARRAYS) :], rest, strict=True)))


def _write(
    base: Path,
    shard: Path,
    lines: list[Line],
    reading: Reading,
    expected: dict[str, Any],
    known: dict[str, int],
    workers: Workers[_Worker],
) -> None:
    texts = [text for batch in workers(_Worker.texts, _batches(lines, _TEXTS)) for text in batch]
    new = list(dict.fromkeys(path for text in texts for path in text.images if path not in known))
    numbers, reasons, sources = dict(known), dict[str, str](), list[str]()
    with write_beside(shard) as stream:
        writer = ShardWriter(stream, int(expected["number"]))
        read = workers(_Worker.pictures, picture_batches(reading.images, new))
        for path, picture in zip(new, (picture for batch in read for picture in batch), strict=True):
            if picture.reason:
                reasons[path] = picture.reason
                continue
            numbers[path] = len(known) + len(sources)
            writer.add(numbers[path], picture.suffix, picture.content, path)
            sources.append(path)
        places = writer.finish()
    good, bad = list[Text](), list[Document]()
    for line, text in zip(lines, texts, strict=True):
        faults = [f"image {reading.images / path}: {reasons[path]}" for path in text.images if path in reasons]
        if not text.reason and not faults:
            good.append(text)
            continue
        raw = line.raw or orjson.dumps(line.value)
        bad.append(Document(line.place, "", raw, text.reason or "; ".join(faults)))
        reading.policy.set_aside(
            len(bad),
            "conversations",
            bad[-1].reason,
            file=reading.file,
            place=line.place,
            mend="mend or remove the conversation or its image, or set such ones",
            look="look at the file's form and the folder of images",
        )
    with write_beside(base.with_suffix(".npz")) as stream:
        np.savez(
            stream,
            ids=np.concatenate([np.zeros(0, dtype="<u2"), *(text.ids for text in good)]),
            counted=np.concatenate([np.zeros(0, dtype=bool), *(text.counted for text in good)]),
            lengths=np.array([len(text.ids) for text in good], dtype="<i8"),
            images=np.array([numbers[path] for text in good for path in text.images], dtype=ROW_IMAGES_DTYPE),
            image_counts=np.array([len(text.images) for text in good], dtype="<i8"),
            places=places.astype(INDEX_DTYPE),
        )
    if bad:
        rejected = b"".join(rejected_line(reading.file.name, document) for document in bad)
        write_whole(base.with_suffix(".rejected.jsonl"), rejected)
    record = {
        "conversations": len(good),
        "rejected": len(bad),
        "sources": sources,
        "content": digest_file(base.with_suffix(".npz")),
        "shard": vars(ShardRecord(shard.name, len(sources), shard.stat().st_size, digest_file(shard))),
        "tool_version": TOOL_VERSION,
        **expected,
    }
    write_whole(base.with_suffix(".json"), canonical_json(sealed(record)))


def picture_batches(folder: Path, paths: Iterable[str]) -> Iterator[list[str]]:
    """Images for a process at a time: few, and of no more bytes than one may have."""
    batch, held = list[str](), 0
    for path in paths:
        try:
            size = min((folder / path).stat().st_size, MOST_BYTES)
        except OSError:  # whoever reads it says why
            size = 0
        if batch and (len(batch) == _PICTURES or held + size > _PICTURE_BYTES):
            yield batch
            batch, held = [], 0
        batch.append(path)
        held += size
    if batch:
        yield batch


def _batches(items: Iterable[_In], size: int) -> Iterator[list[_In]]:
    iterator = iter(items)
    return iter(lambda: list(islice(iterator, size)), [])
