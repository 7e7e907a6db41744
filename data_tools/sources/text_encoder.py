"""Text to token ids: gigatoken does the work, the Hugging Face tokenizer is the reference it is checked against.

The authors used the Hugging Face tokenizer, whose ids differ from sentencepiece's where a text holds `<s>`, `</s>` or
`<unk>` literally: those become control ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gigatoken
import numpy as np
import sentencepiece
import tokenizers

from data_tools.dataset.format import MAX_VOCAB_SIZE, TOKEN_DTYPE, TokenizerRecord, tokenizer_name
from data_tools.files.digest import sha256_file
from data_tools.files.errors import DataError

EOS_TEXT = "</s>"


def sentencepiece_to_hugging_face(path: Path) -> str:
    """The `tokenizer.json` that Hugging Face derives from a LLaMA-like sentencepiece BPE model.

    A merge is any pair of pieces whose concatenation is a piece, in the order of the merged piece's score; pairs of one
    merged piece in the order of their own ids. A leading space is prepended and spaces become U+2581; nothing else
    is normalised (LLaMA's model says `identity`).

    Raises:
        DataError: not a sentencepiece model, or not a BPE model with byte fallback, or one that normalises text.
    """
    remedy = "give LLaMA's tokenizer.model or a tokenizer.json"
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise DataError(f"not a sentencepiece model ({error})", file=path, remedy=remedy) from None
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    if not any(model.is_byte(i) for i in range(len(pieces))):
        raise DataError("the model has no byte fallback", file=path, remedy=remedy)
    probe = "a  B\u00a0\ufb01\t\n "
    if model.decode(model.encode(probe)) != probe:
        raise DataError("the model normalises text (LLaMA's does not)", file=path, remedy=remedy)
    merges: list[tuple[float, int, int, str, str]] = []
    for i, piece in enumerate(pieces):
        if model.is_control(i) or model.is_unknown(i) or model.is_byte(i):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-model.get_score(i), ids[left], ids[right], left, right))
    merges.sort(key=lambda merge: merge[:3])
    special = [i for i in range(len(pieces)) if model.is_control(i) or model.is_unknown(i)]
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": i,
                    "content": pieces[i],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for i in special
            ],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "\u2581"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
                ],
            },
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": pieces[model.unk_id()],
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "ignore_merges": False,
                "vocab": ids,
                # Strings, not pairs: tokenizers before 0.20 read no pairs. No piece holds a space.
                "merges": [f"{left} {right}" for *_, left, right in merges],
            },
        },
        ensure_ascii=False,
    )


def read_tokenizer_json(path: Path) -> str:
    """The Hugging Face form of a `tokenizer.model` or `tokenizer.json`.

    Raises:
        DataError: missing or unusable file.
    """
    if not path.is_file():
        raise DataError("no such tokenizer", file=path, remedy="name a tokenizer.model or tokenizer.json")
    if path.suffix == ".model":
        return sentencepiece_to_hugging_face(path)
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except ValueError as error:
        raise DataError(f"not JSON ({error})", file=path, remedy="give a Hugging Face tokenizer.json") from None
    return text


class TextEncoder:
    """Encodes documents to ids, each followed by EOS, with no BOS.

    Attributes:
        vocab_size: ids lie in [0, vocab_size).
        eos_id: the id of `</s>`.
    """

    def __init__(self, path: Path) -> None:
        """Raises DataError where the tokenizer cannot be used: unreadable, no `</s>`, more ids than uint16 holds."""
        self.path = path
        self._json = read_tokenizer_json(path)
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
        """Ids of one text by the Hugging Face tokenizer, EOS included."""
        return [*self._reference.encode(text, add_special_tokens=False).ids, self.eos_id]

    def check(self, texts: Sequence[str], file: Path) -> None:
        """Compares gigatoken with the Hugging Face tokenizer on `texts` and on every added token.

        Raises:
            DataError: ids differ in a document of `file`, or an added token's do.
        """
        stream, lengths = self.encode(texts)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        for i, text in enumerate(texts):
            ours = stream[bounds[i] : bounds[i + 1]].tolist()
            reference = self.encode_reference(text)
            if ours != reference:
                at = next((k for k, pair in enumerate(zip(ours, reference, strict=False)) if pair[0] != pair[1]), 0)
                digest = hashlib.sha256(text.encode()).hexdigest()[:16]
                raise DataError(
                    f"gigatoken and the Hugging Face tokenizer differ from token {at} on (text sha256 {digest})",
                    file=file,
                    place=f"sampled document {i}",
                    remedy=f"do not use these ids: report the document and {self.path} to gigatoken",
                )
        for token in self._reference.get_added_tokens_decoder().values():
            if self.encode([token.content])[0].tolist() != self.encode_reference(token.content):
                raise DataError(
                    f"gigatoken and the Hugging Face tokenizer differ in {token.content}",
                    file=self.path,
                    place="added_tokens",
                    remedy="number the added tokens as the Hugging Face tokenizer does: behind the vocabulary, no gaps",
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
