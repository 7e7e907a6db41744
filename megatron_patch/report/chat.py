"""`python -m megatron_patch chat RUN`: talk with a chat model on the terminal, each answer as it is drawn.

With `--image FILE` about an image, which stands before the first question of the conversation as LLaVA trains it.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_tools.chat.conversations import Message
from data_tools.chat.template import ChatTokenizer
from data_tools.dataset.format import CHAT_TEMPLATE_NAME, MANIFEST_NAME, DatasetManifest, tokenizer_in
from data_tools.files.errors import DataError
from data_tools.vision.conversations import IMAGE_TEXT
from data_tools.vision.placeholders import ImageTokenizer
from megatron_patch import launch
from megatron_patch.generate import load_model, pictures_of, stream
from megatron_patch.recipe import Model
from megatron_patch.report.summary import newest_checkpoint
from megatron_patch.train.checkpoint import Checkpoint, CheckpointError, open_checkpoint


def main(args: argparse.Namespace) -> int:
    """Reads questions from standard input, one a line, until it ends. Exit code 2: refused, with the remedy."""
    try:
        is_run = (args.run / "checkpoints").is_dir()
        checkpoint = newest_checkpoint(args.run) if is_run else open_checkpoint(args.run)
        tokenizer = _tokenizer(checkpoint, args.data)
        shown = _shown(checkpoint.recipe.model, tokenizer, args.image) if args.image else None
        launch.setup_environment()
        tokenizer.check_texts(_first(args))
        model = load_model(checkpoint.recipe, checkpoint.tensor, timedelta(minutes=10))
    except (ValueError, OSError, CheckpointError, DataError) as error:
        print(f"chat: {error}", file=sys.stderr)
        return 2
    if sys.stdin.isatty():
        print(f"{checkpoint.folder}, step {checkpoint.step}. An empty line begins anew, Ctrl-D ends.", file=sys.stderr)
    _talk(model, tokenizer, checkpoint.recipe.model.sequence_length, args, shown)
    return 0


class _Shown(NamedTuple):
    """An image as the model sees it."""

    pixels: np.ndarray
    """uint8 [1, 3, size, size]."""
    tokenizer: ImageTokenizer

    def prompt(self, first: list[Message], turns: list[Message]) -> list[int]:
        """Ids of a conversation, the image before its first question. Raises ValueError as `ImageTokenizer` does."""
        question, *rest = turns
        asked = {**question, "content": f"{IMAGE_TEXT}\n{question['content'].strip()}"}
        return self.tokenizer.prompt([*first, asked, *rest], images=1)


def _shown(model: Model, tokenizer: ChatTokenizer, file: Path) -> _Shown:
    """Raises ValueError where the model does not see, or the image is none."""
    vision = model.vision
    if vision is None:
        raise ValueError(f"--image {file}: the model has no encoder (model.vision); leave it out")
    from data_tools.vision.pictures import BadPicture, prepare, read_picture

    try:
        picture, _ = read_picture(file.read_bytes())
    except BadPicture as error:
        raise ValueError(f"{file}: {error}; give another image") from None
    with_images = ImageTokenizer(
        tokenizer.path, tokenizer.template_path, tokenizer.vocab_size, vision.placeholder_id, vision.tokens
    )
    return _Shown(prepare(picture, vision.image_size, vision.fit)[None], with_images)


def _talk(
    model: torch.nn.Module, tokenizer: ChatTokenizer, context: int, args: argparse.Namespace, shown: _Shown | None
) -> None:
    first, turns = _first(args), list[Message]()
    generator = torch.Generator().manual_seed(args.seed)

    def prompt_of(turns: list[Message]) -> list[int]:
        return shown.prompt(first, turns) if shown else tokenizer.prompt([*first, *turns])

    for question in _questions():
        if not question.strip():
            turns = []
            continue
        turns.append({"role": "user", "content": question})
        try:
            prompt = prompt_of(turns)
            while len(prompt) >= context and len(turns) > 1:  # the oldest question and answer make room
                del turns[:2]
                prompt = prompt_of(turns)
                print("(the first question is forgotten: the context is full)", file=sys.stderr)
            if len(prompt) >= context:
                raise ValueError(f"{len(prompt):,} tokens, and the model sees {context:,}: ask a shorter question")
        except ValueError as error:
            print(f"chat: {error}", file=sys.stderr)
            turns.pop()
            continue
        ids = stream(
            model,
            prompt,
            end_of_turn=tokenizer.end_of_turn_id,
            limit=args.tokens,
            sequence_length=context,
            vocab_size=tokenizer.vocab_size,
            temperature=args.temperature,
            generator=generator,
            pictures=pictures_of(prompt, shown.pixels, shown.tokenizer.placeholder_id) if shown else None,
        )
        answer = "".join(_printed(_pieces(ids, tokenizer)))
        print(flush=True)
        turns.append({"role": "assistant", "content": answer or "..."})
        try:
            prompt_of([*turns, {"role": "user", "content": "?"}])
        except ValueError as error:  # the model has spelled a control token: no question could follow
            turns = []
            print(f"(the conversation begins anew: {error})", file=sys.stderr)


def _first(args: argparse.Namespace) -> list[Message]:
    return [{"role": "system", "content": args.system}] if args.system else []


def _questions() -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a question that is not UTF-8 is refused, the rest goes on
    while True:
        try:
            yield input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return


def _printed(pieces: Iterator[str]) -> Iterator[str]:
    for piece in pieces:
        print(piece, end="", flush=True)
        yield piece


def _pieces(ids: Iterator[int], tokenizer: ChatTokenizer) -> Iterator[str]:
    """The text of an answer as it grows; a character of several tokens comes with its last."""
    said: list[int] = []
    shown = text = ""
    for token in ids:
        said.append(token)
        text = tokenizer.tokenizer.decode(said, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    yield text[len(shown) :]


def _tokenizer(checkpoint: Checkpoint, data: Path | None) -> ChatTokenizer:
    """Raises DataError where no data set of conversations is there."""
    folder = data or checkpoint.recipe.data.folder
    if folder is None:
        raise DataError("the recipe names no data set", file=checkpoint.folder, remedy="name it with --data")
    manifest = DatasetManifest.read(folder / MANIFEST_NAME)
    tokenizer = tokenizer_in(folder)
    if manifest.chat is None or tokenizer is None:
        raise DataError(
            "no conversations with their template, so the model was not tuned to answer",
            file=folder,
            remedy="name what data_tools/build_chat.py wrote with --data; `summary` continues a text",
        )
    return ChatTokenizer(tokenizer, folder / CHAT_TEMPLATE_NAME, manifest.vocab_size)
