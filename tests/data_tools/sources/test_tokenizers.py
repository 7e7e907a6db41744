"""A tokenizer's ids are its own library's (sentencepiece for a .model, else tokenizers), or it is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from data_tools.files.errors import DataError
from data_tools.sources import text_encoder
from data_tools.sources.sentencepiece_model import SentencepieceModel
from data_tools.sources.text_encoder import TextEncoder

Proto: Any = sentencepiece_model_pb2
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = (
    Proto.ModelProto.SentencePiece.Type.Value(name)
    for name in ("NORMAL", "UNKNOWN", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE")
)
WORDS = ("ab", "xyz", "\u4e2d")
SENTENCES = [f"the {word}{word} of {i} <is>  a\u00e9{word} def f():" for i in range(40) for word in WORDS]
TEXTS = [
    "",
    " ",
    "one",
    " lead",
    "tail ",
    "a  b",
    "x\n\ny",
    "def f():\n    return 1",
    "\u2603 caf\u00e9",
    "the abab <is>",
]


def train(path: Path, **options: Any) -> Path:
    settings: dict[str, Any] = {
        "model_type": "bpe", "vocab_size": 340, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "split_digits": True, "minloglevel": 2, "hard_vocab_limit": False,
    }  # fmt: skip
    with path.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES), model_writer=stream, **{**settings, **options}
        )
    return path


def own_ids(path: Path, texts: list[str]) -> list[int]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [i for text in texts for i in [*model.encode(text), model.eos_id()]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"allow_whitespace_only_pieces": True, "split_by_whitespace": False},
        {"control_symbols": ["<pad2>", "<|im_start|>"], "pad_id": 3},
        {"unk_id": 2, "bos_id": 0, "eos_id": 1},
        {"character_coverage": 0.98, "split_by_unicode_script": False, "split_by_number": False},
    ],
    ids=str,
)
def test_a_model_is_served_with_its_own_ids(options: dict[str, Any], tmp_path: Path) -> None:
    path = train(tmp_path / "x.model", **options)
    encoder = TextEncoder(path)
    encoder.check(TEXTS, path)
    assert encoder.encode(TEXTS)[0].tolist() == own_ids(path, TEXTS)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert encoder.eos_id == model.eos_id() and encoder.vocab_size == model.get_piece_size()
    literal = encoder.encode(["a</s>b"])[0].tolist()  # as Hugging Face's: a control token, which sentencepiece's is not
    assert literal == [*model.encode("a"), model.eos_id(), *model.encode("b"), model.eos_id()]
    decode = tokenizers.Tokenizer.from_str(SentencepieceModel(path).hugging_face()).decode
    assert [decode(model.encode(text)) for text in TEXTS] == [model.decode(model.encode(text)) for text in TEXTS]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model_type": "unigram"}, "the model is of type UNIGRAM, not BPE"),
        ({"model_type": "char"}, "the model is of type CHAR, not BPE"),
        ({"byte_fallback": False}, "the model has no byte fallback"),
        ({"treat_whitespace_as_suffix": True}, "the model puts spaces behind words"),
        ({"user_defined_symbols": ["<sep>", "def "]}, "the model has 2 user-defined pieces, such as '<sep>'"),
        ({"normalization_rule_name": "nmt_nfkc"}, "the model normalises text .nmt_nfkc"),
        ({"normalization_rule_name": "nfkc_cf"}, "the model normalises text .nfkc_cf"),
        ({"remove_extra_whitespaces": True}, "the model normalises text: it removes spaces"),
        ({"eos_piece": "<end>"}, "the model ends a text with '<end>', not with a control piece '</s>'"),
        ({"eos_id": -1}, "the model ends a text with|cannot load"),
    ],
    ids=str,
)
def test_a_model_that_computes_otherwise_is_refused(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"x\.model: {says}"):
        TextEncoder(train(tmp_path / "x.model", **options))


def longest(proto: Any) -> list[Any]:
    return sorted((piece for piece in proto.pieces if piece.type == NORMAL), key=lambda piece: -len(piece.piece))


def set_fields(target: Callable[[Any], Any], **fields: Any) -> Callable[[Any], None]:
    return lambda proto: [setattr(target(proto), name, value) for name, value in fields.items()] and None


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "unused": (set_fields(lambda p: longest(p)[0], type=UNUSED), "has 1 unused pieces, such as '"),
    "user": (set_fields(lambda p: longest(p)[0], type=USER), "has 1 user-defined pieces, such as '"),
    "tie": (lambda p: setattr(longest(p)[0], "score", longest(p)[1].score), "gives '.*' and '.*' one score"),
    "escape": (set_fields(lambda p: p.normalizer_spec, escape_whitespaces=False), "keeps spaces as they are"),
    "word": (set_fields(lambda p: p.trainer_spec, model_type=3), "is of type WORD, not BPE"),
    "control": (
        set_fields(lambda p: p.pieces[1], piece="\u4e2e"),
        "has a control piece '\u4e2e', which any text",
    ),
    "normal end": (set_fields(lambda p: p.pieces[2], type=NORMAL), "ends a text with '</s>', not with a control piece"),
    "lacking": (
        lambda p: setattr(longest(p)[0], "piece", "a\u2602"),
        "has a piece 'a\u2602', but none for its",
    ),
    "byte": (lambda p: setattr(longest(p)[0], "piece", "<0x4G>"), "has a piece '<0x4G>', but none for its"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_proto_says_is_read(name: str, tmp_path: Path) -> None:
    proto = Proto.ModelProto()
    proto.ParseFromString(train(tmp_path / "x.model").read_bytes())
    change, says = CHANGES[name]
    change(proto)
    (tmp_path / "x.model").write_bytes(proto.SerializeToString())
    with pytest.raises(DataError, match=rf"x\.model: the model {says}"):
        TextEncoder(tmp_path / "x.model")


@pytest.mark.parametrize("spoil", ["prefix", "merges", "special"])
def test_the_check_at_start_asks_sentencepiece_itself(
    spoil: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion that is wrong is wrong for gigatoken and tokenizers alike."""
    path = train(tmp_path / "x.model")
    good = SentencepieceModel.hugging_face

    def wrong(self: SentencepieceModel) -> str:
        value = json.loads(good(self))
        if spoil == "prefix":
            del value["normalizer"]["normalizers"][0]
        elif spoil == "merges":
            value["model"]["merges"].reverse()
        else:
            del value["added_tokens"][1]
        return json.dumps(value)

    monkeypatch.setattr(SentencepieceModel, "hugging_face", wrong)
    with pytest.raises(DataError, match="gigatoken and sentencepiece differ from token"):
        TextEncoder(path).check([], path)


def spoiled(path: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    value = json.loads(SentencepieceModel(path).hugging_face())
    change(value)
    target.write_text(json.dumps(value))
    return target


TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "<unk>",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(truncation=TRUNCATION), 'truncation: cuts documents short: .*"max_length": 2'),
        (lambda v: v.update(truncation={**TRUNCATION, "max_length": 1 << 20}), "truncation: cuts documents short"),
        (lambda v: v.update(padding=PADDING), "padding: adds ids to documents"),
        (lambda v: v["model"].update(dropout=0.1), "model.dropout: gives a text other ids each time: 0.1"),
        (lambda v: v.clear(), "cannot load: no model in it"),
        (lambda v: v.update(model=5), "cannot load: no model in it"),
    ],
)
def test_a_json_that_gives_other_ids_than_the_texts_own_is_refused(
    change: Callable[[dict[str, Any]], object], says: str, tmp_path: Path
) -> None:
    path = spoiled(train(tmp_path / "x.model"), tmp_path / "x.json", change)
    with pytest.raises(DataError, match=rf"x\.json: {says}"):
        TextEncoder(path)


@pytest.mark.parametrize("content", [b"[" * 1_000_000, b'{"model": ' + b"[" * 100_000, b"5", b"[]", b"\xff", b""])
def test_what_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.json: (not JSON|cannot load)"):
        TextEncoder(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["x.json", "x.model"])
def test_an_endless_file_is_not_read(name: str, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(DataError, match="longer than 268,435,456 bytes"):
        TextEncoder(tmp_path / name)


@pytest.mark.parametrize("added", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}])
def test_a_json_is_checked_on_hard_texts_and_on_its_added_tokens(added: dict[str, bool], tmp_path: Path) -> None:
    """Whatever a token's settings: what the check lets pass has the ids of the tokenizers library."""

    def change(value: dict[str, Any]) -> None:
        size = len(value["model"]["vocab"])
        value["added_tokens"].append({**value["added_tokens"][0], "id": size, "content": "<more>", **added})

    path = spoiled(train(tmp_path / "x.model"), tmp_path / "x.json", change)
    library = tokenizers.Tokenizer.from_file(str(path))
    texts = [*TEXTS, "a <more> b", "a<more>b", "  <more>  ", "<more><more>"]
    encoder = TextEncoder(path)
    try:
        encoder.check(texts, tmp_path)
    except DataError as error:
        assert "gigatoken and the Hugging Face tokenizer differ" in error.message
        return
    want = [i for text in texts for i in [*library.encode(text, add_special_tokens=False).ids, encoder.eos_id]]
    np.testing.assert_array_equal(encoder.encode(texts)[0], want)


def test_a_json_that_differs_on_a_hard_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = spoiled(train(tmp_path / "x.model"), tmp_path / "x.json", lambda value: None)
    good = TextEncoder.encode

    def wrong(self: TextEncoder, texts: list[str]) -> object:
        return good(self, [text.replace("\u00a0", " ") for text in texts])

    monkeypatch.setattr(TextEncoder, "encode", wrong)
    with pytest.raises(DataError, match=r"hard text \d+: gigatoken and the Hugging Face tokenizer differ .*\\xa0"):
        TextEncoder(path).check(TEXTS, path)
    assert any("\u00a0" in text for text in text_encoder.HARD_TEXTS)
