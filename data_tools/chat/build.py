"""Conversations -> packed rows with their marks: the fixed-row data set of `dataset/format.py` and two files more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data_tools.chat.packing import BestFit, pack
from data_tools.chat.parts import Part, Reading, read_parts
from data_tools.chat.template import ChatTokenizer
from data_tools.dataset.format import (
    CHAT_TEMPLATE_NAME,
    HELD_OUT_NAME,
    MANIFEST_NAME,
    SEED,
    TOKEN_DTYPE,
    ChatRecord,
    DatasetManifest,
    TokenizerRecord,
    pack_marks,
    segment_name,
    tokenizer_name,
)
from data_tools.dataset.segment_files import (
    DatasetPlan,
    finished_segment,
    keep_tokenizer,
    write_companions,
    write_dataset_manifest,
)
from data_tools.files.digest import new_digest, sha256_file
from data_tools.files.durable import folder_lock, write_beside, write_whole
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.files.json_file import content_digest
from data_tools.sources.text_encoder import read_vocab_size

SOURCES = ("conversations",)
PADDING_ID = 0  # LLaMA's <unk>; counts nowhere and no conversation sees it
_BLOCK_ROWS = 1024


@dataclass(frozen=True)
class ChatOptions:
    """What decides the rows, beside the conversations."""

    row_length: int
    overlong: Literal["truncate", "drop"]
    """Of a conversation longer than a row: keep its first ids, if any of them counts, or leave it out."""
    held_out_rows: int
    seed: int = SEED
    """Chooses the held-out conversations."""


class _Conversations(NamedTuple):
    """All conversations of all parts, one after the other."""

    ids: np.ndarray
    counted: np.ndarray
    first: np.ndarray
    """int64: where each begins in `ids`."""
    lengths: np.ndarray
    """int64: ids of each that go into a row; 0 where it is left out."""

    def of(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.first[number], self.first[number] + self.lengths[number])
        return self.ids[part], self.counted[part]


def build(
    path: Path,
    output: Path,
    tokenizer: Path,
    template: Path,
    options: ChatOptions,
    *,
    vocab_size: int | None,
    policy: ErrorPolicy,
    workers: int,
) -> DatasetManifest:
    """Builds the data set `output` from the conversations under `path`; the bytes do not depend on `workers`.

    Raises:
        DataError: tokenizer or template cannot be used; whatever `read_parts` raises; no conversation is left to train
            on; `output` was built from other input or with other options.
        FolderBusy: another process writes `output`.
    """
    judged = ChatTokenizer(tokenizer, template, vocab_size)
    record = TokenizerRecord(tokenizer_name(tokenizer), sha256_file(tokenizer), read_vocab_size(tokenizer))
    made_by = {"tokenizer": record.sha256, "template": judged.template_sha256, "vocab_size": judged.vocab_size}
    with folder_lock(output):
        keep_tokenizer(tokenizer, output)
        parts = read_parts(path, output, Reading(tokenizer, template, judged.vocab_size, made_by, policy, workers))
        source = {
            **made_by,
            "parts": content_digest({"parts": [[part.file, part.digest] for part in parts]}),
            "overlong": options.overlong,
            "held_out_rows": options.held_out_rows,
            "seed": options.seed,
        }
        plan = DatasetPlan(
            1, options.row_length, judged.vocab_size, record, has_held_out=options.held_out_rows > 0, sources=SOURCES
        )
        base = output / segment_name(0)
        manifest = output / MANIFEST_NAME
        if finished_segment(base, plan, source) is not None and manifest.is_file():
            return DatasetManifest.read(manifest)
        write_whole(output / CHAT_TEMPLATE_NAME, judged.template.encode())
        conversations, truncated, dropped = _gather(parts, options)
        held_out = _held_out_rows(conversations, options)
        held = {number for row in held_out for number in row}
        twins = _same_ids(conversations, held)
        rest = [n for n in range(len(conversations.lengths)) if conversations.lengths[n] and n not in held | twins]
        rows = pack(rest, conversations.lengths, options.row_length)
        if not rows:
            raise DataError(
                f"none of {len(conversations.lengths)} conversations is left to train on",
                file=path,
                remedy="bring more, hold fewer rows out, or raise --row-length",
            )
        if options.held_out_rows:
            _write_rows(output / HELD_OUT_NAME, held_out, conversations, plan, 0, source)
        rejected = sum(part.rejected for part in parts)
        counted = _write_rows(base, rows, conversations, plan, rejected, source)
        chat = ChatRecord(
            template_sha256=judged.template_sha256,
            end_of_turn=judged.end_of_turn,
            end_of_turn_id=judged.end_of_turn_id,
            conversations=len(rest),
            held_out_conversations=len(held),
            counted=counted,
            truncated=truncated,
            dropped=dropped + len(twins),
            files=[part.file for part in parts],
        )
        return write_dataset_manifest(output, DatasetPlan(**{**vars(plan), "chat": chat}))


def _gather(parts: list[Part], options: ChatOptions) -> tuple[_Conversations, int, int]:
    """All conversations, those longer than a row cut or left out; how many were cut, how many left out."""
    lengths = np.concatenate([part.lengths for part in parts])
    gathered = _Conversations(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.counted for part in parts]),
        np.cumsum(lengths) - lengths,
        np.minimum(lengths, options.row_length),
    )
    truncated = dropped = 0
    for number in np.flatnonzero(lengths > options.row_length).tolist():
        if options.overlong == "truncate" and gathered.of(number)[1].any():
            truncated += 1
        else:
            gathered.lengths[number] = 0
            dropped += 1
    return gathered, truncated, dropped


def _held_out_rows(conversations: _Conversations, options: ChatOptions) -> list[list[int]]:
    """As many rows as are wanted, of conversations drawn by the seed.

    Raises:
        DataError: there are not so many.
    """
    packed = BestFit(options.row_length)
    if options.held_out_rows == 0:
        return packed.rows
    for number in np.random.RandomState(options.seed).permutation(len(conversations.lengths)):
        length = int(conversations.lengths[number])
        if not length:
            continue
        if len(packed.rows) == options.held_out_rows and not packed.fits(length):
            return packed.rows
        packed.add(int(number), length)
    raise DataError(
        f"all conversations fill no more than {len(packed.rows)} rows, and {options.held_out_rows} are to be held out",
        file="--held-out-rows",
        remedy="hold fewer rows out, or bring more conversations",
    )


def _same_ids(conversations: _Conversations, held: set[int]) -> set[int]:
    """Conversations that are held out already, word for word: trained on, they would make the held-out loss a lie."""
    if not held:
        return set()
    known = {conversations.of(number)[0].tobytes() for number in held}
    return {
        number
        for number in range(len(conversations.lengths))
        if conversations.lengths[number] and number not in held and conversations.of(number)[0].tobytes() in known
    }


def _write_rows(
    base: Path,
    rows: list[list[int]],
    conversations: _Conversations,
    plan: DatasetPlan,
    rejected: int,
    source: dict[str, object],
) -> int:
    """Writes a segment; the number of ids that count."""
    digest = new_digest()
    counted = np.zeros((len(rows), plan.row_length), dtype=bool)
    starts = np.zeros((len(rows), plan.row_length), dtype=bool)
    with write_beside(base.with_suffix(".bin")) as stream:
        for at in range(0, len(rows), _BLOCK_ROWS):
            block = rows[at : at + _BLOCK_ROWS]
            ids = np.full((len(block), plan.row_length), PADDING_ID, dtype=TOKEN_DTYPE)
            for i, row in enumerate(block):
                end = 0
                for number in row:
                    first, end = end, end + int(conversations.lengths[number])
                    ids[i, first:end], counted[at + i, first:end] = conversations.of(number)
                    starts[at + i, first] = True
                starts[at + i, end : end + 1] = True  # the padding
            stream.write(ids.data)
            digest.update(ids.data)

    def blocks(marks: np.ndarray) -> Iterator[bytes]:
        for at in range(0, len(marks), _BLOCK_ROWS):
            yield pack_marks(marks[at : at + _BLOCK_ROWS]).tobytes()

    marks = {"mask": blocks(counted), "starts": blocks(starts)}
    write_companions(base, [bytes(len(rows))], len(rows), plan, rejected, source, digest.hexdigest(), marks)
    return int(counted.sum())
