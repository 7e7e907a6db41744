"""A chat model's answers to held-out questions: how many answers end by themselves, and some of them to read."""

from __future__ import annotations

import itertools

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
        for prompt, _ in pairs
    ]
    ended = sum(one.ended for one in said)
    lines = [
        f"\nanswers        {ended} of {len(said)} ({ended / len(said):.0%}) end by themselves within {limit} tokens"
    ]
    for (prompt, expected), one in list(zip(pairs, said, strict=True))[:SHOWN]:
        texts = (tokenizer.tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, one.ids, expected))
        question, answered, true = (text.strip() for text in texts)
        lines += ["", *("    " + line for line in question.splitlines()), f"    {answered}", f"    (true: {true})"]
    return "\n".join(lines)


def held_out_questions(segments: Segments) -> list[tuple[list[int], list[int]]]:
    """Of each held-out conversation the ids before the first answer, and that answer's; none without held-out rows."""
    if not segments.held_out_rows:
        return []
    every = np.arange(segments.held_out_rows)
    marks = segments.held_out_marks(every)
    assert marks is not None
    pairs = []
    for row, counted, starts in zip(segments.read_held_out(every), *marks, strict=True):
        bounds = [*np.flatnonzero(starts), len(row)]
        for first, end in itertools.pairwise(bounds):
            places = np.flatnonzero(counted[first:end])
            if len(places):
                begin = int(places[0])
                length = int(np.argmin([*counted[first + begin : end], False]))
                ids = row[first:end].tolist()
                pairs.append((ids[:begin], ids[begin : begin + length]))
    return pairs
