"""All conversations of a data set -> which of them make which row -> a segment's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from data_tools.chat.packing import BestFit, pack
from data_tools.chat.template import ChatTokenizer
from data_tools.dataset.format import HELD_OUT_NAME, SEED, TOKEN_DTYPE, ChatRecord, pack_marks, segment_name
from data_tools.dataset.images import IMAGES, ROW_IMAGES_DTYPE
from data_tools.dataset.segment_files import DatasetPlan, write_companions
from data_tools.files.digest import new_digest
from data_tools.files.durable import write_beside
from data_tools.files.errors import DataError

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

    @property
    def source(self) -> dict[str, Any]:
        """Its entries in a manifest's `source`; the row length has a field of its own."""
        return {"overlong": self.overlong, "held_out_rows": self.held_out_rows, "seed": self.seed}


class Encoded(Protocol):
    """Conversations of one file, one after the other."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def counted(self) -> np.ndarray: ...
    @property
    def lengths(self) -> np.ndarray: ...


class Conversations(NamedTuple):
    """All conversations of all parts, one after the other."""

    ids: np.ndarray
    counted: np.ndarray
    first: np.ndarray
    """int64: where each begins in `ids`."""
    lengths: np.ndarray
    """int64: ids of each that go into a row; 0 where it is left out."""
    truncated: int
    dropped: int
    images: Sequence[np.ndarray] | None = None
    """Of each the numbers of its images in their order; None where there are none."""

    def of(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.first[number], self.first[number] + self.lengths[number])
        return self.ids[part], self.counted[part]

    def content(self, number: int) -> bytes:
        """Equal where two conversations say the same of the same images."""
        images = b"" if self.images is None else self.images[number].tobytes()
        return images + b"|" + self.of(number)[0].tobytes()


class Rows(NamedTuple):
    """Which conversations make each row, and what became of the others."""

    conversations: Conversations
    training: list[list[int]]
    held_out: list[list[int]]
    twins: int
    """Held out already, word for word, and therefore in no row."""

    def record(self, chat: ChatTokenizer, counted: int, files: list[str]) -> ChatRecord:
        """What the data set's manifest says of its conversations; `counted` ids of the training rows count."""
        return ChatRecord(
            template_sha256=chat.template_sha256,
            end_of_turn=chat.end_of_turn,
            end_of_turn_id=chat.end_of_turn_id,
            conversations=sum(map(len, self.training)),
            held_out_conversations=sum(map(len, self.held_out)),
            counted=counted,
            truncated=self.conversations.truncated,
            dropped=self.conversations.dropped + self.twins,
            files=files,
        )


def gathered(
    parts: Sequence[Encoded],
    options: ChatOptions,
    images: Sequence[np.ndarray] | None = None,
    placeholder_id: int | None = None,
) -> Conversations:
    """All conversations; those longer than a row are cut or left out. None is cut where an image would be lost."""
    lengths = np.concatenate([part.lengths for part in parts])
    ids, counted = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "counted"))
    first, kept = np.cumsum(lengths) - lengths, np.minimum(lengths, options.row_length)
    truncated = dropped = 0
    for number in np.flatnonzero(lengths > options.row_length).tolist():
        begin, cut, end = first[number] + np.array([0, options.row_length, lengths[number]])
        loses_image = placeholder_id is not None and (ids[cut - 1 : end] == placeholder_id).any()
        if options.overlong == "truncate" and counted[begin:cut].any() and not loses_image:
            truncated += 1
        else:
            kept[number] = 0
            dropped += 1
    return Conversations(ids, counted, first, kept, truncated, dropped, images)


def chosen_rows(conversations: Conversations, options: ChatOptions, path: Path) -> Rows:
    """Raises DataError where there are fewer held-out rows than asked for, or none is left to train on."""
    held_out = _held_out_rows(conversations, options)
    held = {number for row in held_out for number in row}
    twins = _same_content(conversations, held)
    rest = [n for n in range(len(conversations.lengths)) if conversations.lengths[n] and n not in held | twins]
    rows = pack(rest, conversations.lengths, options.row_length)
    if not rows:
        raise DataError(
            f"none of {len(conversations.lengths)} conversations is left to train on",
            file=path,
            remedy="bring more, hold fewer rows out, or raise --row-length",
        )
    return Rows(conversations, rows, held_out, len(twins))


def _held_out_rows(conversations: Conversations, options: ChatOptions) -> list[list[int]]:
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


def _same_content(conversations: Conversations, held: set[int]) -> set[int]:
    """Conversations that are held out already, word for word: trained on, they would make the held-out loss a lie."""
    if not held:
        return set()
    known = {conversations.content(number) for number in held}
    return {
        number
        for number in range(len(conversations.lengths))
        if conversations.lengths[number] and number not in held and conversations.content(number) in known
    }


def write_all(output: Path, rows: Rows, plan: DatasetPlan, rejected: int, source: dict[str, Any]) -> int:
    """Writes the held-out rows, where the plan has some, and the one segment; the number of its ids that count."""
    if plan.has_held_out:
        _write_rows(output / HELD_OUT_NAME, rows.held_out, rows.conversations, plan, 0, source)
    return _write_rows(output / segment_name(0), rows.training, rows.conversations, plan, rejected, source)


def _write_rows(
    base: Path,
    rows: list[list[int]],
    conversations: Conversations,
    plan: DatasetPlan,
    rejected: int,
    source: dict[str, Any],
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
    if plan.images is not None and conversations.images is not None:
        marks[IMAGES] = iter([_row_images(rows, conversations.images, plan.images.per_row).tobytes()])
    write_companions(base, [bytes(len(rows))], len(rows), plan, rejected, source, digest.hexdigest(), marks)
    return int(counted.sum())


def _row_images(rows: list[list[int]], images: Sequence[np.ndarray], per_row: int) -> np.ndarray:
    """int32 [rows, per_row]: of each row the images of its conversations, -1 behind them."""
    of_rows = np.full((len(rows), per_row), -1, dtype=ROW_IMAGES_DTYPE)
    for i, row in enumerate(rows):
        numbers = np.concatenate([images[number] for number in row])
        of_rows[i, : len(numbers)] = numbers
    return of_rows
