"""A chat template and a tokenizer, judged together before any conversation: messages to ids, and which of them count.

The template is a Jinja text as `transformers` renders it, answers marked with {% generation %}; it is the one that goes
into the exported tokenizer, so a conversation has the same ids here as in `apply_chat_template` anywhere.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.chat.conversations import Message
from data_tools.files.errors import DataError
from data_tools.files.plain_file import read_plain
from data_tools.sources.documents import bad_text
from data_tools.sources.text_encoder import EOS_TEXT, read_tokenizer_json, read_vocab_size

CONTROL_TOKENS = {"bos_token": "<s>", "eos_token": EOS_TEXT, "unk_token": "<unk>", "pad_token": "<unk>"}
"""What a template may name, where the tokenizer has it."""

_QUESTION = [{"role": "user", "content": "Which colour has the sky?"}]
_PROBE = [
    *_QUESTION,
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "And grass?"},
    {"role": "assistant", "content": "Green."},
]


class Encoded(NamedTuple):
    """One conversation."""

    ids: np.ndarray
    """uint16 [n]."""
    counted: np.ndarray
    """bool [n]: the ids of answers, each end of turn among them."""


class ChatTokenizer:
    """Renders conversations to ids.

    Attributes:
        template: the template's text.
        end_of_turn, end_of_turn_id: the control token that ends each answer; generation stops at it.
        vocab_size: ids are below it.
        tokenizer: the `transformers` tokenizer, with the template in it.
    """

    def __init__(self, tokenizer: Path, template: Path, vocab_size: int | None = None) -> None:
        """Raises DataError where tokenizer or template cannot be read, or do not give answers that end."""
        self.path, self.template_path = tokenizer, template
        # Its own threads would stand beside those of as many processes.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            content = read_plain(template).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot be read ({error})", file=template, remedy="name a chat template") from None
        self.template = content
        self.template_sha256 = hashlib.sha256(content.encode()).hexdigest()
        self.vocab_size = read_vocab_size(tokenizer) if vocab_size is None else vocab_size
        self.tokenizer = _load(tokenizer, content, EOS_TEXT)
        self.end_of_turn_id = self._find_end_of_turn()
        self.end_of_turn = str(self.tokenizer.convert_ids_to_tokens(self.end_of_turn_id))
        if self.end_of_turn != self.tokenizer.eos_token:  # the exported tokenizer's EOS is the end of turn
            before = self._render(_PROBE)[0]
            self.tokenizer = _load(tokenizer, content, self.end_of_turn)
            if self._render(_PROBE)[0] != before:
                self._refuse("eos_token stands beside another end of turn", f"write {EOS_TEXT!r} where it is meant")
        self._controls = [str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        self._check_prompt()

    def encode(self, messages: list[Message], but: str = "") -> Encoded:
        """Ids of a conversation.

        Raises ValueError where the template refuses it or gives what cannot be trained on, and as `check_texts` does.
        """
        self.check_texts(messages, but)
        ids, counted = self._render(messages)
        if (highest := max(ids, default=0)) >= self.vocab_size:
            raise ValueError(f"id {highest} is beyond the vocabulary of {self.vocab_size}")
        encoded = Encoded(np.array(ids, dtype="<u2"), np.array(counted, dtype=bool))
        encoded.counted[:1] = False  # nothing comes before the first id, by which it could be predicted
        answers = sum(message["role"] == "assistant" for message in messages)
        ends = int((encoded.ids[encoded.counted] == self.end_of_turn_id).sum())
        if ends != answers:
            raise ValueError(f"{answers} answers hold {ends} times the end of turn {self.end_of_turn}")
        return encoded

    def prompt(self, messages: list[Message], but: str = "") -> list[int]:
        """Ids that an answer follows: `messages` end with the user's. Raises ValueError as `encode` does."""
        self.check_texts(messages, but)
        return self._ids(messages, add_generation_prompt=True)

    def check_texts(self, messages: list[Message], but: str = "") -> None:
        """A control token is the template's to write: in a message, its name would become the token.

        Raises ValueError where a message names one other than `but`, or is no text of whole characters.
        """
        for message in messages:
            if reason := bad_text(message["content"]):
                raise ValueError(f"{reason}, in a message of the {message['role']}")
            for control in self._controls:
                if control != but and control in message["content"]:
                    raise ValueError(
                        f"{control} in a message of the {message['role']}, which would become the control token; "
                        f"write it otherwise, e.g. {control[:1]} {control[1:]}"
                    )

    def _render(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        out = self._apply(messages, return_dict=True, return_assistant_tokens_mask=True)
        return out["input_ids"], out["assistant_masks"]

    def _ids(self, messages: list[Message], **options: Any) -> list[int]:
        return list(self._apply(messages, return_dict=True, **options)["input_ids"])

    def _apply(self, messages: list[Message], **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=True, **options)
        except (TemplateError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            raise ValueError(f"the template says: {error}") from None

    def _find_end_of_turn(self) -> int:
        """The control token that ends each answer of the probe, blanks after it left aside."""
        try:
            ids, counted = self._render(_PROBE)
        except ValueError as error:
            self._refuse(str(error), "mend it; transformers' documentation says what a template may do")
        if not any(counted):
            self._refuse("marks no answer", "put {% generation %} and {% endgeneration %} around what the model says")
        spans = np.flatnonzero(np.diff([0, *counted, 0])).reshape(-1, 2).tolist()
        controls = set(self.tokenizer.get_added_vocab().values())
        ends = []
        for first, stop in spans:
            span = ids[first:stop]
            last = max((i for i, token in enumerate(span) if token in controls), default=-1)
            if last < 0 or self.tokenizer.decode(span[last + 1 :]).strip():
                self._refuse(
                    "an answer does not end with a control token, so the model would never learn to stop",
                    "write the end of turn, e.g. eos_token, after the answer and before {% endgeneration %}",
                )
            ends.append(span[last])
        if len(spans) != 2 or len(set(ends)) != 1:
            said = f"{len(spans)} answers marked, which end with {self.tokenizer.convert_ids_to_tokens(ends)}"
            self._refuse(f"of two answers: {said}", "mark each answer, and end all with one control token")
        return int(ends[0])

    def _check_prompt(self) -> None:
        """What generation starts from must be what training has seen before an answer, to the last id."""
        prompt, whole = self.prompt(_QUESTION), self._render(_PROBE)
        first = whole[1].index(1)
        if prompt != whole[0][:first]:
            self._refuse(
                "with add_generation_prompt a question gives other ids than stand before its answer in training",
                "end the prompt where the answer's own token begins, e.g. with a newline, in both places",
            )

    def _refuse(self, said: str, remedy: str) -> Any:
        raise DataError(said, file=self.template_path, place="template", remedy=remedy)


def _load(tokenizer: Path, template: str, end_of_turn: str) -> Any:
    """The `transformers` tokenizer that `export` writes."""
    try:
        from transformers import PreTrainedTokenizerFast
        from transformers.utils import logging
    except ImportError:
        raise DataError(
            "transformers is not installed, whose rendering of templates is the reference",
            file=tokenizer,
            remedy="pip install -c constraints.txt -e '.[chat]'",
        ) from None
    from tokenizers import Tokenizer

    logging.set_verbosity_error()  # an unmarked template is an error here, not a warning
    read = Tokenizer.from_str(read_tokenizer_json(tokenizer))
    known = {role: text for role, text in CONTROL_TOKENS.items() if read.token_to_id(text) is not None}
    known["eos_token"] = end_of_turn
    if read.token_to_id(end_of_turn) is None:
        raise DataError(f"no token {end_of_turn}", file=tokenizer, remedy="give LLaMA's tokenizer")
    loaded = PreTrainedTokenizerFast(tokenizer_object=read, clean_up_tokenization_spaces=False, **known)
    loaded.chat_template = template
    return loaded
