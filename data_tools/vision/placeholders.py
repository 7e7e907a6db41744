"""Conversations about images -> ids, with as many placeholders for an image as the encoder gives tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_tools.chat.conversations import Message
from data_tools.chat.template import ChatTokenizer, Encoded
from data_tools.files.errors import DataError
from data_tools.vision.conversations import IMAGE_TEXT, Asked


class ImageTokenizer:
    """A chat template and a tokenizer, and the token that stands for a part of an image.

    Attributes:
        chat: the two.
        placeholder, placeholder_id: a control token that neither text nor template use; LLaMA's `<s>` is one in
            MobiLlama.
        tokens: so many of it stand for an image.
    """

    def __init__(
        self, tokenizer: Path, template: Path, vocab_size: int | None, placeholder: str | int, tokens: int
    ) -> None:
        """`placeholder` by its text, or, of a model, by its id. Raises DataError where one of them cannot be used."""
        self.chat = ChatTokenizer(tokenizer, template, vocab_size)
        self.tokens = tokens
        known = self.chat.tokenizer.get_added_vocab()
        found = [(text, int(token)) for text, token in known.items() if placeholder in (text, token)]
        if not found:
            raise DataError(
                f"{placeholder!r} is none of its control tokens "
                f"({', '.join(f'{text} {token}' for text, token in known.items())})",
                file=tokenizer,
                remedy="name one that no text of yours has as --placeholder"
                if isinstance(placeholder, str)
                else "give the tokenizer that the model was trained with",
            )
        [(self.placeholder, self.placeholder_id)] = found
        if self.placeholder_id == self.chat.end_of_turn_id or self.placeholder_id == 0:
            raise DataError(
                f"{self.placeholder!r} ends a turn or pads rows, so it cannot stand for an image",
                file=tokenizer,
                remedy="name another control token as --placeholder",
            )
        if self.placeholder_id >= self.chat.vocab_size:
            raise DataError(
                f"the id {self.placeholder_id} of {self.placeholder!r} is beyond the vocabulary of "
                f"{self.chat.vocab_size}",
                file=tokenizer,
                remedy="name another control token as --placeholder, or raise --vocab-size",
            )

    def encode(self, asked: Asked) -> Encoded:
        """Ids of a conversation; raises ValueError as `ChatTokenizer.encode` does, and where placeholders go astray."""
        encoded = self.chat.encode(self._with_placeholders(asked.messages), self.placeholder)
        self._check(encoded.ids, len(asked.images))
        return encoded

    def prompt(self, messages: list[Message], images: int) -> list[int]:
        """Ids that an answer follows, of `messages` with so many `IMAGE_TEXT`. Raises ValueError as `encode` does."""
        ids = self.chat.prompt(self._with_placeholders(messages), self.placeholder)
        self._check(np.array(ids), images)
        return ids

    def _with_placeholders(self, messages: list[Message]) -> list[Message]:
        for message in messages:
            if self.placeholder in message["content"]:
                raise ValueError(f"a text with {self.placeholder}, which stands for a part of an image here")
        image = self.placeholder * self.tokens
        return [{**message, "content": message["content"].replace(IMAGE_TEXT, image)} for message in messages]

    def _check(self, ids: np.ndarray, images: int) -> None:
        found = int((ids == self.placeholder_id).sum())
        if found != self.tokens * images:
            raise ValueError(f"{found} placeholders for {images} images of {self.tokens}: see the template")
