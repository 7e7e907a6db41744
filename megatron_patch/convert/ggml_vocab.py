"""A byte-fallback BPE `tokenizer.json` as llama.cpp keeps it: pieces, their scores and their types.

llama.cpp's `llama` tokenizer is sentencepiece's BPE: of all adjacent pairs whose concatenation is a piece it merges the
one of the highest score, the leftmost of equals. Hugging Face's merges the pair listed first. The two agree where every
such pair is listed and the pairs of one piece stand together, as in LLaMA's own files; what differs is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from megatron_patch.convert.source import ConvertError

_REMEDY = "give the tokenizer.model it was made from, or a tokenizer.json like LLaMA's"


@dataclass(frozen=True)
class GgmlVocab:
    """`pieces`, `scores` and `types` by id; `space_prefix`: whether a text gets a leading space."""

    pieces: list[str]
    scores: list[float]
    types: list[TokenType]
    space_prefix: bool


def ggml_vocab(tokenizer_json: str, size: int, named: str) -> GgmlVocab:
    """The vocabulary of a `tokenizer.json`, filled up to `size` ids with unused ones. Errors name it as `named`.

    Raises:
        ConvertError: not a BPE with byte fallback, or one whose ids llama.cpp would not give.
    """
    content = json.loads(tokenizer_json)
    model = content["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise ConvertError(f"{named}: not a BPE with byte fallback, which llama.cpp's `llama` is; {_REMEDY}")
    ids: dict[str, int] = model["vocab"]
    pieces = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for piece, i in ids.items():
        pieces[i] = piece
        types[i] = TokenType.BYTE if _is_byte(piece) else TokenType.NORMAL
    for token in content.get("added_tokens", []):
        pieces[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if (unknown := model.get("unk_token")) in ids:
        types[ids[unknown]] = TokenType.UNKNOWN
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    scores = [0.0] * size
    ordinary = {piece for piece, i in ids.items() if types[i] == TokenType.NORMAL}
    for piece, rank in _ranks(merges, ordinary, named).items():
        scores[ids[piece]] = -float(rank)
    return GgmlVocab(pieces, scores, types, _space_prefix(content, named))


def _ranks(merges: list[tuple[str, ...]], ordinary: set[str], named: str) -> dict[str, int]:
    """Pieces that merges make, numbered in the order of their merges."""
    ranks: dict[str, int] = {}
    last = ""
    for pair in merges:
        piece = "".join(pair)
        if len(pair) != 2 or piece not in ordinary:
            raise ConvertError(f"{named}: the merge {pair} makes no piece of its vocabulary; {_REMEDY}")
        if piece in ranks and piece != last:
            raise ConvertError(f"{named}: the merges that make {piece!r} do not stand together; {_REMEDY}")
        ranks.setdefault(piece, len(ranks))
        last = piece
    listed = set(merges)
    for piece in ordinary:
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            if pair not in listed and ordinary.issuperset(pair):
                raise ConvertError(f"{named}: does not merge {pair}, which llama.cpp would; {_REMEDY}")
    return ranks


def _space_prefix(content: dict[str, Any], named: str) -> bool:
    """Spaces must become U+2581 and nothing else change; says whether one is put before a text."""
    normalizer: dict[str, Any] = content.get("normalizer") or {}
    splitter: dict[str, Any] = content.get("pre_tokenizer") or {}
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer]
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    if not splitter and steps in ([prepend, replace], [replace]):
        return steps[0] == prepend
    metaspace = splitter.get("type") == "Metaspace" and splitter["replacement"] == "\u2581"
    if not normalizer and metaspace and splitter.get("split") is False:
        scheme = splitter.get("prepend_scheme", "always")
        if scheme in ("always", "never"):
            return bool(scheme == "always")
    raise ConvertError(f"{named}: normalises or splits text in a way that llama.cpp's `llama` does not; {_REMEDY}")


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
