"""Files of conversations -> their ids, a part a file, kept until the data set is built from them.

parts/part_00000.npz              ids and marks of a file's conversations, one after the other, and their lengths
parts/part_00000.rejected.jsonl   bad conversations, where there are some and --on-error quarantine
parts/part_00000.json             the part's manifest; written last
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.chat.conversations import Line, conversation_files, messages_of, read_lines
from data_tools.chat.template import ChatTokenizer
from data_tools.chat.workers import Workers
from data_tools.dataset.format import TOOL_VERSION
from data_tools.files.digest import digest_file, new_digest
from data_tools.files.durable import unchanged, write_beside, write_whole
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.files.json_file import canonical_json, read_sealed, sealed
from data_tools.files.progress import Progress
from data_tools.sources.documents import Document, rejected_line
from data_tools.sources.source_files import list_left_out

PARTS = "parts"
_BATCH = 256  # conversations at a time for a process, fewer where they are long
_BATCH_BYTES = 1 << 23


@dataclass(frozen=True)
class Reading:
    """How the files are read."""

    tokenizer: Path
    template: Path
    vocab_size: int
    identity: dict[str, Any]
    """Names tokenizer, template and vocabulary in the parts' manifests."""
    policy: ErrorPolicy
    workers: int


class Part(NamedTuple):
    """Conversations of one file."""

    file: str
    ids: np.ndarray
    """uint16, of all conversations."""
    counted: np.ndarray
    """bool, like `ids`."""
    lengths: np.ndarray
    """int64 [conversations]."""
    rejected: int
    digest: str
    """Of the part's content."""


class _Read(NamedTuple):
    """Of a batch of lines: the good conversations' ids, marks and lengths, and the bad ones."""

    ids: np.ndarray
    counted: np.ndarray
    lengths: list[int]
    bad: list[Document]


def read_parts(path: Path, output: Path, reading: Reading) -> list[Part]:
    """The conversations of all files under `path`; those of files that an earlier run finished are not read again.

    Raises:
        DataError: a bad conversation under the policy `stop`, or too many; a file that cannot be read; a part made
            from other input or with other options.
    """
    files = conversation_files(path)
    folder = output / PARTS
    folder.mkdir(parents=True, exist_ok=True)
    root = path.parent if path.is_file() else path
    names = [file.relative_to(root).as_posix() for file in files]
    for left_out in list_left_out(path) if path.is_dir() else ():
        print(f"conversations: {left_out}", file=sys.stderr)
    if extra := sorted(folder.glob("part_*.json"))[len(files) :]:
        raise DataError(
            f"is there, but the input has {len(files)} files",
            file=extra[0],
            remedy="use another --output, or remove the folder",
        )
    parts = []
    arguments = (reading.tokenizer, reading.template, reading.vocab_size)
    with (
        Workers(reading.workers, ChatTokenizer, *arguments) as workers,
        Progress("conversations", sum(file.stat().st_size for file in files), "B") as progress,
    ):
        for number, (file, name) in enumerate(zip(files, names, strict=True)):
            base = folder / f"part_{number:05d}"
            if not base.with_suffix(".json").is_file():
                _write(base, file, name, reading, workers)
            parts.append(_finished(base, file, name, reading))
            progress.advance(file.stat().st_size)
    return parts


def _finished(base: Path, file: Path, name: str, reading: Reading) -> Part:
    path = base.with_suffix(".json")
    record = read_sealed(path, f"remove {base.name}.* to read {name} again")
    expected = {"file": name, "input": digest_file(file), **reading.identity}
    if {key: record.get(key) for key in expected} != expected:
        raise DataError(
            f"made from other input than {file}, or with other options",
            file=path,
            remedy="use another --output, or remove the folder",
        )
    content = base.with_suffix(".npz")
    if not content.is_file() or digest_file(content) != record["content"]:
        raise DataError("missing or not as its manifest says", file=content, remedy=f"remove {base.name}.* beside it")
    with np.load(content, allow_pickle=False) as arrays:
        return Part(
            name, arrays["ids"], arrays["counted"], arrays["lengths"], int(record["rejected"]), str(record["content"])
        )


def _write(base: Path, file: Path, name: str, reading: Reading, workers: Workers[ChatTokenizer]) -> None:
    digest, bad = new_digest(), list[Document]()
    ids, counted, lengths = [], [], list[int]()
    with unchanged(file, file.stat().st_size):
        for read in workers(_encode, _batches(read_lines(file, digest))):
            for document in read.bad:
                bad.append(document)
                reading.policy.set_aside(
                    len(bad),
                    "conversations",
                    document.reason,
                    file=file,
                    place=document.place,
                    mend="mend or remove the conversation, or set such ones",
                    look="look at the file's form",
                )
            ids.append(read.ids)
            counted.append(read.counted)
            lengths += read.lengths
    with write_beside(base.with_suffix(".npz")) as stream:
        np.savez(
            stream,
            ids=np.concatenate([np.zeros(0, dtype="<u2"), *ids]),
            counted=np.concatenate([np.zeros(0, dtype=bool), *counted]),
            lengths=np.array(lengths, dtype="<i8"),
        )
    rejected = base.with_suffix(".rejected.jsonl")
    if bad:
        write_whole(rejected, b"".join(rejected_line(name, document) for document in bad))
    record = {
        "file": name,
        # A compressed file's lines have another digest than its bytes, by which a finished part knows it again.
        "input": digest_file(file),
        "lines": digest.hexdigest(),
        "conversations": len(lengths),
        "rejected": len(bad),
        "content": digest_file(base.with_suffix(".npz")),
        "tool_version": TOOL_VERSION,
        **reading.identity,
    }
    write_whole(base.with_suffix(".json"), canonical_json(sealed(record)))


def _batches(lines: Iterator[Line]) -> Iterator[list[Line]]:
    batch: list[Line] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line.raw)
        if len(batch) == _BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: ChatTokenizer, batch: list[Line]) -> _Read:
    good, bad = [], []
    for line in batch:
        try:
            if line.reason:
                raise ValueError(line.reason)
            good.append(tokenizer.encode(messages_of(line.value)))
        except ValueError as error:
            bad.append(Document(line.place, "", line.raw, str(error)))
    return _Read(
        np.concatenate([np.zeros(0, dtype="<u2"), *(c.ids for c in good)]),
        np.concatenate([np.zeros(0, dtype=bool), *(c.counted for c in good)]),
        [len(c.ids) for c in good],
        bad,
    )
