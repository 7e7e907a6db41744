"""What a model that sees says of held-out images: its accuracy, the same with images exchanged, a picture of some."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from data_tools.chat.template import ChatTokenizer
from data_tools.dataset.format import CHAT_TEMPLATE_NAME
from data_tools.files.durable import write_beside
from megatron_patch.data.images import Images
from megatron_patch.data.segments import Segments
from megatron_patch.generate import answer, pictures_of
from megatron_patch.recipe import Vision
from megatron_patch.report.answers import Question, held_out_questions

MOST_QUESTIONS, SHOWN, COLUMNS = 256, 4, 8
PICTURE_NAME = "answers.png"


def held_out_seen(model: torch.nn.Module, segments: Segments, vision: Vision, limit: int, run: Path) -> str:
    """A paragraph for a terminal, and RUN/answers.png: greedy answers to the first held-out questions about one image.

    An answer is right where it is the true one, id for id. With images exchanged, each question is asked of the image
    of another one, half of them further on: what is right then was not seen.

    Raises:
        DataError: tokenizer, template or images are not what they were when the data set was built.
    """
    assert segments.tokenizer_path is not None  # build_vision.py leaves one
    questions = [q for q in held_out_questions(segments) if len(q.images) == 1][:MOST_QUESTIONS]
    if len(questions) < 2:
        return "\nanswers        fewer than two questions about an image are held out, so none is asked"
    images = Images(segments.folder, segments.manifest, vision.image_size, vision.fit)
    pixels = images.read([q.images[0] for q in questions])
    images.close()
    said = _answers(model, segments, vision, questions, pixels, limit)
    exchanged = _answers(model, segments, vision, questions, np.roll(pixels, len(pixels) // 2, axis=0), limit)
    tokenizer = ChatTokenizer(segments.tokenizer_path, segments.folder / CHAT_TEMPLATE_NAME, segments.vocab_size)

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    lines = [
        f"\naccuracy       {_share(said, questions)} of {len(questions)} held-out questions about an image",
        f"exchanged      {_share(exchanged, questions)} with the image of another question",
    ]
    asked = [text(q.prompt) for q in questions]
    answered, true = [text(ids) for ids in said], [text(q.answer) for q in questions]
    for i in range(min(SHOWN, len(questions))):
        shown = [f"[image {questions[i].images[0]}]", *asked[i].splitlines(), answered[i], f"(true: {true[i]})"]
        lines += ["", *("    " + line for line in shown)]
    draw(pixels[: 4 * COLUMNS], answered, true, run / PICTURE_NAME)
    return "\n".join([*lines, f"\npicture        {run / PICTURE_NAME}"])


def _answers(
    model: torch.nn.Module,
    segments: Segments,
    vision: Vision,
    questions: Sequence[Question],
    pixels: np.ndarray,
    limit: int,
) -> list[list[int]]:
    chat = segments.manifest.chat
    assert chat is not None
    said = []
    for question, image in zip(questions, pixels, strict=True):
        one = answer(
            model,
            question.prompt,
            end_of_turn=chat.end_of_turn_id,
            limit=limit,
            sequence_length=segments.row_length - 1,
            vocab_size=segments.vocab_size,
            pictures=pictures_of(question.prompt, image[None], vision.placeholder_id),
        )
        said.append([*one.ids, chat.end_of_turn_id] if one.ended else one.ids)
    return said


def _share(said: Sequence[Sequence[int]], questions: Sequence[Question]) -> str:
    right = sum(list(ids) == list(q.answer) for ids, q in zip(said, questions, strict=True))
    return f"{right / len(questions):.1%}"


def draw(pixels: np.ndarray, answered: Sequence[str], true: Sequence[str], path: Path) -> None:
    """Images, uint8 [n, 3, size, size], each under its answer; red, with the true one behind it, where it is wrong."""
    rows = -(-len(pixels) // COLUMNS)
    figure = Figure(figsize=(1.4 * COLUMNS, 1.7 * rows), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, said, meant in zip(grid.flat, pixels, answered, true, strict=False):
        axes.imshow(image.transpose(1, 2, 0))
        right = said == meant
        title = said if right else f"{said} ({meant})"
        axes.set_title(title[:40], fontsize=8, color="black" if right else "tab:red", parse_math=False)
    with write_beside(path) as stream:
        figure.savefig(stream, format="png", dpi=120)
