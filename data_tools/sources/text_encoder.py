"""Text to token ids: gigatoken does the work, the tokenizer's own library is the reference it is checked against.

The authors used the Hugging Face tokenizer, whose ids differ from sentencepiece's where a text holds `<s>`, `</s>` or
`<unk>` literally: those become control ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import gigatoken
import numpy as np
import tokenizers

from data_tools.dataset.format import MAX_VOCAB_SIZE, TOKEN_DTYPE, TokenizerRecord, tokenizer_name
from data_tools.files.digest import sha256_file
from data_tools.files.errors import DataError
from data_tools.files.plain_file import file_size
from data_tools.sources.hard_texts import HARD_TEXTS, around
from data_tools.sources.sentencepiece_model import EOS_TEXT, SentencepieceModel

LARGEST_TOKENIZER = 1 << 28


def read_tokenizer_json(path: Path) -> str:
    """The Hugging Face form of a `tokenizer.model` or `tokenizer.json`.

    Raises:
        DataError: missing or unusable file, or one whose ids of a text are not always the same and all of its ids.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[str, SentencepieceModel | None]:
    if not path.is_file():
        raise DataError("no such tokenizer", file=path, remedy="name a tokenizer.model or tokenizer.json")
    if file_size(path) > LARGEST_TOKENIZER:
        raise DataError(f"longer than {LARGEST_TOKENIZER:,} bytes", file=path, remedy="give LLaMA's tokenizer")
    if path.suffix == ".model":
        model = SentencepieceModel(path)
        return model.hugging_face(), model
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error})", file=path, remedy="give a Hugging Face tokenizer.json") from None
    if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
        raise DataError("cannot load: no model in it", file=path, remedy="give a Hugging Face tokenizer.json")
    for place, setting, harm in (
        ("truncation", value.get("truncation"), "cuts documents short"),
        ("padding", value.get("padding"), "adds ids to documents"),
        ("model.dropout", value["model"].get("dropout"), "gives a text other ids each time"),
    ):
        if setting:
            raise DataError(f"{harm}: {json.dumps(setting)}", file=path, place=place, remedy="set it to null there")
    return text, None


class TextEncoder:
    """Encodes documents to ids, each followed by EOS, with no BOS.

    Attributes:
        vocab_size: ids lie in [0, vocab_size).
        eos_id: the id of `</s>`.
    """

    def __init__(self, path: Path) -> None:
        """Raises DataError where the tokenizer cannot be used: unreadable, no `</s>`, more ids than uint16 holds."""
        self.path = path
        self._json, self._model = _read(path)
        try:
            self._fast = gigatoken.Tokenizer.from_json(self._json)
            self._reference = tokenizers.Tokenizer.from_str(self._json)
        except Exception as error:  # both libraries raise bare Exception
            raise DataError(f"cannot load: {error}", file=path, remedy="give LLaMA's tokenizer") from None
        # Control tokens are what a tokenizer.json puts around a text; Amber has EOS after it and nothing before.
        self.vocab_size = _vocab_size(self._reference, path)
        eos_id = self._reference.token_to_id(EOS_TEXT)
        if eos_id is None:
            raise DataError(f"no token {EOS_TEXT}", file=path, remedy="give LLaMA's tokenizer")
        self.eos_id: int = eos_id

    def record(self) -> TokenizerRecord:
        """The tokenizer's entry in a manifest."""
        return TokenizerRecord(
            file=tokenizer_name(self.path), sha256=sha256_file(self.path), vocab_size=self.vocab_size
        )

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of `texts` on the calling thread.

        Returns:
            uint16 ids of all texts, EOS after each; and int64 [len(texts)] number of ids of each, EOS included.

        Raises:
            DataError: gigatoken gives an id that the Hugging Face tokenizer does not have.
        """
        layout: Any = self._fast.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets, dtype=np.int64)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        if ids.max(initial=0) >= self.vocab_size:
            raise DataError(
                f"gigatoken gives the id {ids.max()}, but ids are below {self.vocab_size}",
                file=self.path,
                remedy="number the added tokens as the Hugging Face tokenizer does: behind the vocabulary, no gaps",
            )
        lengths = np.diff(offsets) + 1
        ends = np.cumsum(lengths) - 1
        stream = np.empty(len(ids) + len(lengths), dtype=TOKEN_DTYPE)
        is_id = np.ones(len(stream), dtype=bool)
        is_id[ends] = False
        stream[is_id] = ids
        stream[ends] = self.eos_id
        return stream, lengths

    def encode_reference(self, text: str) -> list[int]:
        """Ids of one text, EOS included, by the tokenizer's own library: sentencepiece's for a `.model`, else Hugging
        Face's. In both, the name of a control token that stands in a text is that token."""
        ids = self._model.encode(text) if self._model else self._encode_hugging_face(text)
        return [*ids, self.eos_id]

    def _encode_hugging_face(self, text: str) -> list[int]:
        return list(self._reference.encode(text, add_special_tokens=False).ids)

    def check(self, texts: Sequence[str], file: Path) -> None:
        """Compares gigatoken with the tokenizer's own library on `texts`, hard texts, added tokens and every id's text.

        For a `.model` the Hugging Face form, which exports carry, is compared with sentencepiece too, but for `texts`.

        Raises:
            DataError: ids differ in a document of `file`, or in another text.
        """
        self._compare(texts, file, "sampled document")
        for what, fixed in self._fixed_texts():
            self._compare(fixed, self.path, what)
            for i, text in enumerate(fixed if self._model else []):
                if [*self._encode_hugging_face(text), self.eos_id] != self.encode_reference(text):
                    self._refuse(
                        self.path, f"{what} {i}", f"sentencepiece and its Hugging Face form differ in {text!a}"
                    )

    def _fixed_texts(self) -> Iterator[tuple[str, list[str]]]:
        added = [token.content for token in self._reference.get_added_tokens_decoder().values()]
        yield "added token", [text for content in added for text in around(content)]
        yield "hard text", list(HARD_TEXTS)
        together = 64
        starts = range(0, self.vocab_size, together)
        every = [list(range(start, min(start + together, self.vocab_size))) for start in starts]
        yield f"text of {together} ids", [self._reference.decode(ids, skip_special_tokens=True) for ids in every]

    def _compare(self, texts: Sequence[str], file: Path, what: str) -> None:
        stream, lengths = self.encode(texts)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        for i, text in enumerate(texts):
            ours = stream[bounds[i] : bounds[i + 1]].tolist()
            reference = self.encode_reference(text)
            if ours != reference:
                at = next((k for k, pair in enumerate(zip(ours, reference, strict=False)) if pair[0] != pair[1]), 0)
                digest = hashlib.sha256(text.encode()).hexdigest()[:16]
                other = "sentencepiece" if self._model else "the Hugging Face tokenizer"
                shown = ascii(text) if len(text) < 80 else f"text sha256 {digest}"
                self._refuse(file, f"{what} {i}", f"gigatoken and {other} differ from token {at} on ({shown})")

    def _refuse(self, file: Path, place: str, reason: str) -> NoReturn:
        raise DataError(
            reason,
            file=file,
            place=place,
            remedy=f"do not use these ids: {self.path} cannot be served. Number added tokens as the Hugging Face"
            " tokenizer does, behind the vocabulary, no gaps; if they are, report the text to gigatoken",
        )


def read_vocab_size(path: Path) -> int:
    """Number of ids of a tokenizer file.

    Raises:
        DataError: missing or unusable file.
    """
    text = read_tokenizer_json(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"cannot load: {error}", file=path, remedy="give LLaMA's tokenizer") from None
    return _vocab_size(tokenizer, path)


def _vocab_size(tokenizer: tokenizers.Tokenizer, path: Path) -> int:
    """Number of ids, which are 0 to it: what an id is compared with, and what 16 bits must hold."""
    count = tokenizer.get_vocab_size(with_added_tokens=True)
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size != count:
        raise DataError(
            f"{count} ids, but the highest is {size - 1}", file=path, remedy="use a tokenizer whose ids have no gaps"
        )
    if size > MAX_VOCAB_SIZE:
        raise DataError(
            f"{size} ids do not fit in 16 bits",
            file=path,
            remedy=f"use a tokenizer of at most {MAX_VOCAB_SIZE} ids",
        )
    return int(size)
