"""A chat model's answers to held-out questions: how many answers end by themselves, and some of them to read."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch

from data_tools.chat.template import ChatTokenizer
from data_tools.dataset.format import CHAT_TEMPLATE_NAME
from megatron_patch.data.segments import Segments
from megatron_patch.generate import answer

MOST_QUESTIONS, SHOWN = 32, 4


def held_out_answers(model: torch.nn.Module, segments: Segments, limit: int) -> str:
    """A paragraph for a terminal: greedy answers of up to `limit` ids to the first held-out questions.

    Raises:
        DataError: tokenizer or template are not what they were when the data set was built.
    """
    chat = segments.manifest.chat
    assert chat is not None and segments.tokenizer_path is not None  # build_chat.py leaves both
    pairs = held_out_questions(segments)[:MOST_QUESTIONS]
    if not pairs:
        return "\nanswers        no rows are held out, so no question is left to ask"
    tokenizer = ChatTokenizer(segments.tokenizer_path, segments.folder / CHAT_TEMPLATE_NAME, segments.vocab_size)
    said = [
        answer(
            model,
            prompt,
            end_of_turn=chat.end_of_turn_id,
            limit=limit,
            sequence_length=segments.row_length - 1,
            vocab_size=segments.vocab_size,
        )
        for prompt, *_ in pairs
    ]
    ended = sum(one.ended for one in said)
    lines = [
        f"\nanswers        {ended} of {len(said)} ({ended / len(said):.0%}) end by themselves within {limit} tokens"
    ]
    for (prompt, expected, _), one in list(zip(pairs, said, strict=True))[:SHOWN]:
        texts = (tokenizer.tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, one.ids, expected))
        question, answered, true = (text.strip() for text in texts)
        lines += ["", *("    " + line for line in question.splitlines()), f"    {answered}", f"    (true: {true})"]
    return "\n".join(lines)


class Question(NamedTuple):
    """What a held-out conversation asks first."""

    prompt: list[int]
    """Ids before the first answer."""
    answer: list[int]
    images: list[int]
    """Numbers of the images that the prompt is about."""


def held_out_questions(segments: Segments) -> list[Question]:
    """Of each held-out conversation the ids before the first answer, and that answer's; none without held-out rows."""
    if not segments.held_out_rows:
        return []
    every = np.arange(segments.held_out_rows)
    marks = segments.held_out_marks(every)
    assert marks is not None
    record = segments.manifest.images
    every_image = np.zeros((len(every), 0)) if marks.images is None else marks.images
    questions = []
    for row, counted, starts, images in zip(
        segments.read_held_out(every), marks.counted, marks.starts, every_image, strict=True
    ):
        left = images[images >= 0].tolist()
        bounds = [*np.flatnonzero(starts), len(row)]
        for first, end in itertools.pairwise(bounds):
            places = np.flatnonzero(counted[first:end])
            if len(places):
                begin = int(places[0])
                length = int(np.argmin([*counted[first + begin : end], False]))
                ids = row[first:end].tolist()
                about = ids[:begin].count(record.placeholder_id) // record.tokens if record else 0
                questions.append(Question(ids[:begin], ids[begin : begin + length], left[:about]))
            if record:
                left = left[int((row[first:end] == record.placeholder_id).sum()) // record.tokens :]
    return questions
