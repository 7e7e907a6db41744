"""Conversations about images -> ids, with as many placeholders for an image as the encoder gives tokens."""

from __future__ import annotations

from pathlib import Path

from data_tools.chat.template import ChatTokenizer, Encoded
from data_tools.files.errors import DataError
from data_tools.vision.conversations import IMAGE_TEXT, Asked


class ImageTokenizer:
    """A chat template and a tokenizer, and the token that stands for a part of an image.

    Attributes:
        chat: the two.
        placeholder_id: a control token's that neither text nor template use; LLaMA's `<s>` is one in MobiLlama.
    """

    def __init__(self, tokenizer: Path, template: Path, vocab_size: int | None, placeholder: str, tokens: int) -> None:
        """Raises DataError where one of them cannot be used."""
        self.chat = ChatTokenizer(tokenizer, template, vocab_size)
        self.placeholder, self.tokens = placeholder, tokens
        known = self.chat.tokenizer.get_added_vocab()
        if placeholder not in known:
            raise DataError(
                f"{placeholder!r} is none of its control tokens ({', '.join(known)})",
                file=tokenizer,
                remedy="name one that no text of yours has as --placeholder",
            )
        self.placeholder_id = int(known[placeholder])
        if self.placeholder_id == self.chat.end_of_turn_id or self.placeholder_id == 0:
            raise DataError(
                f"{placeholder!r} ends a turn or pads rows, so it cannot stand for an image",
                file=tokenizer,
                remedy="name another control token as --placeholder",
            )
        if self.placeholder_id >= self.chat.vocab_size:
            raise DataError(
                f"the id {self.placeholder_id} of {placeholder!r} is beyond the vocabulary of {self.chat.vocab_size}",
                file=tokenizer,
                remedy="name another control token as --placeholder, or raise --vocab-size",
            )

    def encode(self, asked: Asked) -> Encoded:
        """Ids of a conversation; raises ValueError as `ChatTokenizer.encode` does, and where placeholders go astray."""
        for message in asked.messages:
            if self.placeholder in message["content"]:
                raise ValueError(f"a text with {self.placeholder}, which stands for a part of an image here")
        image = self.placeholder * self.tokens
        encoded = self.chat.encode([{**m, "content": m["content"].replace(IMAGE_TEXT, image)} for m in asked.messages])
        found = int((encoded.ids == self.placeholder_id).sum())
        if found != self.tokens * len(asked.images):
            raise ValueError(f"{found} placeholders for {len(asked.images)} images of {self.tokens}: see the template")
        return encoded
