"""A sentencepiece `.model` as a Hugging Face `tokenizer.json`: what the two do alike is converted, the rest refused.

Whether the ids are sentencepiece's own is compared at every start (text_encoder.py); here stands why they must be.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from data_tools.files.errors import DataError
from data_tools.files.plain_file import read_plain

EOS_TEXT = "</s>"
SPACE = "\u2581"
_REMEDY = "give LLaMA's tokenizer.model or a tokenizer.json"
_pb: Any = sentencepiece_model_pb2  # made at run time: no type checker sees what is in it
_Kinds = _pb.ModelProto.SentencePiece


class SentencepieceModel:
    """A BPE model with byte fallback and no normalisation, as LLaMA's is; with or without LLaMA's leading space.

    Attributes:
        pieces: by id.
        special: ids of control pieces and of the unknown one, which a text that holds their names is given (as the
            authors' Hugging Face tokenizer does; sentencepiece itself reads such names as any text).
    """

    def __init__(self, path: Path) -> None:
        """Raises DataError where sentencepiece cannot load the model, or the conversion would not keep its ids."""
        self.path = path
        proto = _pb.ModelProto()
        try:
            content = read_plain(path)
            proto.ParseFromString(content)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError, DecodeError) as error:
            raise DataError(f"not a sentencepiece model ({error})", file=path, remedy=_REMEDY) from None
        if reason := next(_not_served(proto), None):
            raise DataError(f"the model {reason}", file=path, remedy=_REMEDY)
        self.pieces = [piece.piece for piece in proto.pieces]
        self.special = [i for i, piece in enumerate(proto.pieces) if piece.type in (_Kinds.CONTROL, _Kinds.UNKNOWN)]
        self._proto = proto
        names = sorted((self.pieces[i] for i in self.special), key=len, reverse=True)
        self._special_names = re.compile("(" + "|".join(map(re.escape, names)) + ")")

    def encode(self, text: str) -> list[int]:
        """sentencepiece's ids of `text`; a special piece's name in it splits it, and stands for the piece."""
        ids: list[int] = []
        for i, part in enumerate(self._special_names.split(text)):
            if i % 2:
                ids.append(self._processor.piece_to_id(part))
            else:
                ids += self._processor.encode(part)
        return ids

    def hugging_face(self) -> str:
        """The `tokenizer.json` that Hugging Face derives from LLaMA's model.

        A merge is any pair of pieces whose concatenation is a piece, in the order of the merged piece's score; pairs of
        one merged piece in the order of their own ids.
        """
        ids = {piece: i for i, piece in enumerate(self.pieces)}
        prefix = [{"type": "Prepend", "prepend": SPACE}] if self._proto.normalizer_spec.add_dummy_prefix else []
        leading = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
        return json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [
                    {
                        "id": i,
                        "content": self.pieces[i],
                        "single_word": False,
                        "lstrip": False,
                        "rstrip": False,
                        "normalized": False,
                        "special": True,
                    }
                    for i in self.special
                ],
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}],
                },
                "pre_tokenizer": None,
                "post_processor": None,
                "decoder": {
                    "type": "Sequence",
                    "decoders": [
                        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                        {"type": "ByteFallback"},
                        {"type": "Fuse"},
                        *leading,
                    ],
                },
                "model": {
                    "type": "BPE",
                    "dropout": None,
                    "unk_token": self.pieces[self._processor.unk_id()],
                    "continuing_subword_prefix": None,
                    "end_of_word_suffix": None,
                    "fuse_unk": True,
                    "byte_fallback": True,
                    "ignore_merges": False,
                    "vocab": ids,
                    # Strings, not pairs: tokenizers before 0.20 read no pairs. No piece that is merged holds a space.
                    "merges": [f"{left} {right}" for left, right in self._merges(ids)],
                },
            },
            ensure_ascii=False,
        )

    def _merges(self, ids: dict[str, int]) -> list[tuple[str, str]]:
        normal = {piece.piece for piece in self._proto.pieces if piece.type == _Kinds.NORMAL}
        merges = []
        for piece in self._proto.pieces:
            text = piece.piece
            if text not in normal or " " in text:  # sentencepiece never meets a space: it is U+2581 by then
                continue
            for cut in range(1, len(text)):
                left, right = text[:cut], text[cut:]
                if left in normal and right in normal:
                    merges.append((-piece.score, ids[left], ids[right], left, right))
        return [merge[3:] for merge in sorted(merges)]


def _not_served(proto: Any) -> Iterator[str]:
    """Why a model's ids would not be those of its Hugging Face form; nothing where they are."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE:
        yield f"is of type {trainer.ModelType.Name(trainer.model_type)}, not BPE"
    if not trainer.byte_fallback:
        yield "has no byte fallback"
    if trainer.treat_whitespace_as_suffix:
        yield "puts spaces behind words (treat_whitespace_as_suffix)"
    if normalizer.precompiled_charsmap:
        yield f"normalises text ({normalizer.name or 'precompiled_charsmap'}; LLaMA's does not: identity)"
    if normalizer.remove_extra_whitespaces:
        yield "normalises text: it removes spaces (remove_extra_whitespaces)"
    if not normalizer.escape_whitespaces:
        yield "keeps spaces as they are (escape_whitespaces is off)"
    by_kind = collections.defaultdict(list)
    for piece in proto.pieces:
        by_kind[piece.type].append(piece)
    for kind, word in ((_Kinds.USER_DEFINED, "user-defined"), (_Kinds.UNUSED, "unused")):
        if by_kind[kind]:
            yield f"has {len(by_kind[kind])} {word} pieces, such as {by_kind[kind][0].piece!r}"
    if {piece.piece for piece in by_kind[_Kinds.BYTE]} != {f"<0x{i:02X}>" for i in range(256)}:
        yield "has no byte fallback: not a piece for each byte, <0x00> to <0xFF>"
    if trainer.eos_piece != EOS_TEXT or EOS_TEXT not in {piece.piece for piece in by_kind[_Kinds.CONTROL]}:
        yield f"ends a text with {trainer.eos_piece!r}, not with a control piece {EOS_TEXT!r}"
    special = [piece.piece for piece in by_kind[_Kinds.CONTROL] + by_kind[_Kinds.UNKNOWN]]
    if odd := [name for name in special if len(name) < 2]:
        yield f"has a control piece {odd[0]!r}, which any text may hold"
    normal = {piece.piece for piece in by_kind[_Kinds.NORMAL]}
    scores: dict[float, str] = {}
    for piece in by_kind[_Kinds.NORMAL]:
        text = piece.piece
        if len(text) < 2:
            continue
        # sentencepiece merges whatever makes a piece, and of equal scores the leftmost first; Hugging Face's form
        # merges pieces alone, and has an order for all pairs.
        if lacking := next((character for character in text if character not in normal), None):
            yield f"has a piece {text!r}, but none for its {lacking!r}"
        if (other := scores.setdefault(piece.score, text)) != text:
            yield f"gives {other!r} and {text!r} one score"
        if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            yield f"has a piece {text!r} that is no byte"
