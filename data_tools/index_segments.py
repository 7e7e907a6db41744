"""`index`: JSONL segments -> `.bin`, `.idx`, `.src`, each row checked."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools.documents import open_decompressed
from data_tools.durable import folder_lock, write_beside, write_whole
from data_tools.format import (
    HELD_OUT_NAME,
    TOKEN_DTYPE,
    VOCAB_SIZE,
    DataError,
    DatasetManifest,
    TokenizerRecord,
    file_size,
    new_digest,
    read_json,
    segment_name,
    sha256_file,
    tokenizer_in,
)
from data_tools.mix import MIX_MANIFEST, list_segments
from data_tools.progress import Progress
from data_tools.row_parser import parse_rows
from data_tools.segment_files import (
    DatasetPlan,
    carry_tokenizer,
    finished_segment,
    write_companions,
    write_dataset_manifest,
)
from data_tools.text_encoder import read_vocab_size

BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class ErrorPolicy:
    """What to do about a bad row: stop at the first, or set up to `max_rejected` of a segment aside."""

    quarantine: bool = False
    max_rejected: int = 100


def plan_dataset(folder: Path, row_length: int | None, vocab_size: int | None) -> DatasetPlan:
    """What `mix.json` says of a folder of JSONL segments, or, without one, what its files and the arguments say.

    Raises:
        DataError: arguments that contradict `mix.json` or the tokenizer in the folder.
    """
    path = folder / MIX_MANIFEST
    if path.is_file():
        value = read_json(path, "mix again")
        plan = DatasetPlan(
            num_segments=value["num_segments"],
            row_length=value["row_length"],
            vocab_size=value["vocab_size"],
            tokenizer=TokenizerRecord(**value["tokenizer"]),
            dropped_rows=value["dropped_rows"],
            rejected=value["rejected"],
            has_held_out=value["has_held_out"],
        )
        for name, given in (("row_length", row_length), ("vocab_size", vocab_size)):
            if given is not None and given != getattr(plan, name):
                raise DataError(f"{name} is {getattr(plan, name)}, not {given}", file=path, remedy=f"omit --{name}")
        return plan
    record = None
    if (tokenizer := tokenizer_in(folder)) is not None:
        record = TokenizerRecord(tokenizer.name, sha256_file(tokenizer), read_vocab_size(tokenizer))
        if vocab_size is not None and vocab_size != record.vocab_size:
            raise DataError(
                f"has {record.vocab_size} ids, --vocab-size says {vocab_size}",
                file=tokenizer,
                remedy="omit --vocab-size",
            )
        vocab_size = record.vocab_size
    return DatasetPlan(
        num_segments=len(list(list_segments(folder))),
        row_length=row_length or 2049,
        vocab_size=vocab_size or VOCAB_SIZE,
        tokenizer=record,
    )


def index(
    folder: Path, output: Path, plan: DatasetPlan, policy: ErrorPolicy, segments: range | None = None
) -> DatasetManifest | None:
    """Indexes the segments under `folder` into `output`; with `segments`, only those, and no manifest of the whole.

    Raises:
        DataError: see `index_segment` and `write_dataset_manifest`.
    """
    paths = dict(list_segments(folder))
    wanted = segments or range(plan.num_segments)
    if wanted.stop > len(paths):
        raise DataError(f"no segment {wanted.stop - 1}: there are {len(paths)}", file=folder, remedy="check --segment")
    work = [(paths[k], output / segment_name(k)) for k in wanted]
    if plan.has_held_out and 0 in wanted:
        work.append((folder / f"{HELD_OUT_NAME}.jsonl", output / HELD_OUT_NAME))
    part = "" if segments is None else f".{wanted.start:03d}-{wanted.stop - 1:03d}"
    with folder_lock(output, shared=segments is not None), folder_lock(output, f".lock{part}.index"):
        carry_tokenizer(folder, output)
        with Progress("index", sum(file_size(path) for path, _ in work), "B") as progress:
            for path, base in work:
                index_segment(path, base, plan, policy)
                progress.advance(file_size(path))
        return write_dataset_manifest(output, plan) if segments is None else None


def index_segment(path: Path, base: Path, plan: DatasetPlan, policy: ErrorPolicy) -> None:
    """Turns one JSONL segment into the files of `base`; does nothing where an earlier run has finished it.

    Raises:
        DataError: the first bad row, with line and column; too many bad rows; a file that cannot be decompressed; no
            rows at all; files made from other input.
    """
    source = {"file": path.name, "bytes": file_size(path)}
    if finished_segment(base, plan, source) is not None:
        return
    reader = _SegmentReader(path, plan, policy)
    digest = new_digest()
    with write_beside(base.with_suffix(".bin")) as stream:
        for ids in reader.blocks():
            stream.write(ids.data)
            digest.update(ids.data)
    if not reader.rows:
        raise DataError("no rows", file=path, remedy="fetch or mix the segment again")
    rejected_path = base.with_suffix(".rejected.jsonl")
    rejected_path.unlink(missing_ok=True)
    if reader.rejected:
        write_whole(rejected_path, b"".join(reader.rejected))
    source["xxh3_128"] = reader.digest.hexdigest()
    source["lines"] = reader.lines
    _check_input_digest(path, source["xxh3_128"])
    write_companions(base, reader.codes, reader.rows, plan, len(reader.rejected), source, digest.hexdigest())


def _check_input_digest(path: Path, digest: Any) -> None:
    """Compares a segment's bytes with the manifest that `mix` or `fetch` wrote beside it, where there is one."""
    marker = path.parent / f"{path.name.split('.')[0]}.json"
    if marker.is_file() and path.name.endswith(".jsonl"):
        expected = read_json(marker, "mix or fetch the segment again")["digests"]["jsonl"]
        if digest != expected:
            raise DataError(
                f"its digest is {digest}, its manifest says {expected}", file=path, remedy="mix or fetch it again"
            )


class _SegmentReader:
    """Reads a JSONL segment block by block into arrays of ids.

    Attributes:
        rows, lines: good rows and lines so far.
        codes: source codes so far, in blocks.
        rejected: lines for the `.rejected.jsonl`.
        digest: running XXH3-128 of the (decompressed) input.
    """

    def __init__(self, path: Path, plan: DatasetPlan, policy: ErrorPolicy) -> None:
        self.path, self.plan, self.policy = path, plan, policy
        self.rows = self.lines = 0
        self.codes: list[bytes] = []
        self.rejected: list[bytes] = []
        self.digest = new_digest()

    def blocks(self) -> Iterator[np.ndarray]:
        """The rows, uint16 [n, row_length] at a time."""
        with open_decompressed(self.path) as stream:
            for block in self._line_blocks(stream):
                yield from self._parse(block)

    def _line_blocks(self, stream: BinaryIO) -> Iterator[memoryview]:
        """Blocks that end at the end of a line (or of the file)."""
        rest = b""
        while block := stream.read(BLOCK_BYTES):
            self.digest.update(block)
            end = block.rfind(b"\n") + 1
            if end:
                yield memoryview(rest + block[:end])
                rest = block[end:]
            else:
                rest += block
        if rest:
            yield memoryview(rest)

    def _parse(self, block: memoryview) -> Iterator[np.ndarray]:
        at = 0
        # The shortest row has one digit and one comma an id.
        capacity = len(block) // (2 * self.plan.row_length) + 1
        while at < len(block):
            ids = np.empty((capacity, self.plan.row_length), dtype=TOKEN_DTYPE)
            codes = np.empty(capacity, dtype=np.uint8)
            parsed = parse_rows(block[at:], ids, codes, self.plan.vocab_size)
            self.rows += parsed.rows
            self.lines += parsed.lines
            self.codes.append(codes[: parsed.rows].tobytes())
            yield ids[: parsed.rows]
            at += parsed.consumed
            if parsed.column:
                end = bytes(block[at:]).find(b"\n") + 1
                stop = at + end if end else len(block)
                self._reject(bytes(block[at:stop]), parsed.column, parsed.reason)
                at = stop

    def _reject(self, line: bytes, column: int, reason: str) -> None:
        self.lines += 1
        place = f"line {self.lines} column {column}"
        if not self.policy.quarantine:
            raise DataError(
                reason,
                file=self.path,
                place=place,
                remedy="mend or fetch the segment again, or set bad rows aside with --on-error quarantine",
            )
        if len(self.rejected) == self.policy.max_rejected:
            raise DataError(
                f"more than {self.policy.max_rejected} bad rows, the last: {reason}",
                file=self.path,
                place=place,
                remedy="fetch the segment again, or raise --max-rejected",
            )
        line = line.removesuffix(b"\n")
        try:
            content = {"row": line.decode()}
        except UnicodeDecodeError:
            content = {"row_base64": base64.b64encode(line).decode()}
        record = {"line": self.lines, "column": column, "reason": reason, **content}
        self.rejected.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
