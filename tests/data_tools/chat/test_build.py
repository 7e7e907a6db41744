"""Conversations to rows: the ids of stock `transformers`, marks by an oracle of the test's own, and what is refused."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_tools.build_chat import build_parser, run
from data_tools.chat.packing import pack
from data_tools.chat.template import ChatTokenizer
from data_tools.dataset.format import DatasetManifest, marks_row_bytes, unpack_marks
from data_tools.files.errors import DataError
from data_tools.index import row_blocks
from data_tools.index.verify import verify
from data_tools.packing_options import DEFAULT_TEMPLATE
from tests.convert.samples import train_tokenizer

ROW = 250  # not a multiple of 8: the last byte of a row's marks is padded
ROW_BYTES = marks_row_bytes(ROW)
WORDS = ["the quick", "brown fox", "jumps", "\n\n", "é", "漢字", "< unk>", "A. B.", "  two", "### Human:", "\t", "🙂"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def stock(tokenizer: Path, template: str):
    """The tokenizer as anyone loads it."""
    from transformers import PreTrainedTokenizerFast

    from data_tools.sources.sentencepiece_model import SentencepieceModel

    file = tokenizer.with_name("stock.json")
    file.write_text(SentencepieceModel(tokenizer).hugging_face())
    loaded = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    loaded.chat_template = template
    return loaded


def some_conversations(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    draw = random.Random(seed)

    def text() -> str:
        return "x" + "".join(draw.choice(WORDS) for _ in range(draw.randint(1, 5)))

    made = []
    for _ in range(count):
        messages = [{"role": "system", "content": text()}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 2)):
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        made.append(messages)
    return made


def in_shape(messages: list[dict[str, str]], number: int) -> dict:
    """Each shape in turn, where it can say the conversation."""
    if number % 3 == 1:
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        return {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages]}
    if number % 3 == 2 and [m["role"] for m in messages] == ["user", "assistant"]:
        return {"instruction": messages[0]["content"], "input": "", "output": messages[1]["content"]}
    return {"messages": messages}


def write(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def build(source: Path, output: Path, tokenizer: Path, *more: str) -> DatasetManifest:
    arguments = ["build", "--input", str(source), "--output", str(output), "--tokenizer", str(tokenizer)]
    run(build_parser().parse_args([*arguments, "--row-length", str(ROW), "--workers", "1", *more]))
    return DatasetManifest.read(output / "manifest.json")


def stored(folder: Path, name: str = "segment_000") -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Ids and marks of the conversations of a segment; each row's padding must count nowhere and is left out."""
    rows = np.fromfile(folder / f"{name}.bin", "<u2").reshape(-1, ROW)
    counted, starts = (
        unpack_marks(np.fromfile(folder / f"{name}.{suffix}", np.uint8).reshape(len(rows), -1), ROW)
        for suffix in ("mask", "starts")
    )
    found = []
    for row, marks, begins in zip(rows, counted, starts, strict=True):
        firsts = [*np.flatnonzero(begins), ROW]
        for first, end in itertools.pairwise(firsts):
            if marks[first:end].any():
                found.append((tuple(row[first:end].tolist()), tuple(marks[first:end].tolist())))
            else:
                assert end == ROW and not row[first:end].any()
    return found


def expected(messages: list[dict[str, str]], reference) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """`apply_chat_template`'s ids; what counts is what follows the prompt of each answer, up to that answer's end."""
    ids = reference.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    counted = [False] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = reference.apply_chat_template(messages[:number], add_generation_prompt=True, return_dict=True)
            until = reference.apply_chat_template(messages[: number + 1], return_dict=True)
            first, end = len(before["input_ids"]), len(until["input_ids"])
            assert ids[:first] == before["input_ids"] and ids[:end] == until["input_ids"] and ids[end - 1] == 2
            counted[first:end] = [True] * (end - first)
    return tuple(ids), tuple(counted)


def test_ids_are_those_of_transformers_and_answers_count(tokenizer: Path, tmp_path: Path) -> None:
    conversations = some_conversations(60)
    half = len(conversations) // 2
    records = [in_shape(c, i) for i, c in enumerate(conversations)]
    write(tmp_path / "in" / "a.jsonl", records[:half])
    messages = pyarrow.table({"messages": conversations[half:]})
    pyarrow.parquet.write_table(messages, tmp_path / "in" / "b.parquet")
    manifest = build(tmp_path / "in", tmp_path / "out", tokenizer, "--held-out-rows", "3")
    assert manifest.chat is not None and manifest.held_out is not None and manifest.held_out.rows == 3
    reference = stock(tokenizer, DEFAULT_TEMPLATE.read_text())
    ours = stored(tmp_path / "out") + stored(tmp_path / "out", "held_out")
    assert sorted(ours) == sorted(expected(c, reference) for c in conversations)
    assert manifest.chat.conversations + manifest.chat.held_out_conversations == len(conversations)
    assert manifest.chat.counted == sum(sum(marks) for _, marks in stored(tmp_path / "out"))
    assert verify(tmp_path / "out") == []
    # The same command again, and by several processes, and after a part was lost: the same bytes.
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()}
    build(tmp_path / "in", tmp_path / "out", tokenizer, "--held-out-rows", "3")
    for name in ("manifest.json", "segment_000.json", "parts/part_00001.json", "held_out.bin"):
        (tmp_path / "out" / name).unlink()
    build(tmp_path / "in", tmp_path / "out", tokenizer, "--held-out-rows", "3", "--workers", "2")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.is_file()} == before
    with pytest.raises(DataError, match="made from other input or with other settings"):
        build(tmp_path / "in", tmp_path / "out", tokenizer, "--held-out-rows", "4")
    shutil.rmtree(tmp_path / "out/parts")  # which may go
    write(tmp_path / "in" / "c.jsonl", records[:1])
    with pytest.raises(DataError, match=r"manifest\.json: made from other files: 'c\.jsonl' is new"):
        build(tmp_path / "in", tmp_path / "out", tokenizer, "--held-out-rows", "3")
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps(records[0]) + "\n")
    with pytest.raises(DataError, match=r"made from other input than .*a.jsonl"):
        build(tmp_path / "in", tmp_path / "out", tokenizer, "--held-out-rows", "3")


@pytest.mark.parametrize("seed", range(4))
def test_best_fit_fills_rows(seed: int) -> None:
    lengths = np.random.RandomState(seed).randint(2, 101, 500)
    rows = pack(range(500), lengths, 100)
    fill = [sum(lengths[n] for n in row) for row in rows]
    assert max(fill) <= 100 and sorted(n for row in rows for n in row) == list(range(500))
    assert len(rows) <= np.ceil(lengths.sum() / 100 * 11 / 9 + 6 / 9)  # best-fit decreasing's bound (Johnson 1974)
    assert len(rows) <= 1.03 * np.ceil(lengths.sum() / 100)


GOOD = {"messages": [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": "The fox."}]}


def turns(*roles: str, content: str = "dog") -> dict:
    return {"messages": [{"role": role, "content": content} for role in roles]}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (turns("assistant", "user"), "roles in a wrong order: message 1 is the assistant's"),
        (turns("user", "user", "assistant"), "roles in a wrong order: message 2 is the user's"),
        (turns("user", "assistant", "user"), "roles in a wrong order: the last message is the user's"),
        (turns("user", "system", "assistant"), "roles in a wrong order: message 2 is the system's"),
        (turns("system"), "there is no user"),
        (turns("user", "tool"), "a message of 'tool'"),
        (turns("user", "assistant", content=" \n"), "an empty message of the user"),
        ({"instruction": "fox?", "output": ""}, "an empty message of the assistant"),
        ({"instruction": "fox?"}, "none of messages"),
        ({"conversations": [{"from": "human", "text": "x"}]}, "a message without from or value"),
        ({"messages": []}, "messages is no list"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "the text is not a string"),
        (
            turns("user", "assistant", content="a</s>b"),
            "</s> in a message of the user, which would become the control token",
        ),
        (
            {"messages": [*GOOD["messages"], *turns("user", "assistant", content="a<unk>")["messages"]]},
            "<unk> in a message of the user",
        ),
        (turns("user", "assistant", content="\\ud800"), "surrogate"),
        ("[1, 2", "unexpected end of data"),
        ("[1, 2]", "not a JSON object"),
        (turns("user", "assistant", content="no such word"), "the template says: we do not say no"),
    ],
)
def test_a_bad_conversation_is_named_or_counted(tokenizer: Path, tmp_path: Path, bad, reason: str) -> None:
    template = tmp_path / "strict.jinja"
    refusing = (
        "{%- for m in messages %}{% if 'no such' in m.content %}{{ raise_exception('we do not say no') }}{% endif %}"
    )
    template.write_text(refusing + "{%- endfor %}\n" + DEFAULT_TEMPLATE.read_text())
    if isinstance(bad, dict):
        bad = json.dumps(bad).replace("\\\\ud800", "\\ud800")
    source = write(tmp_path / "a.jsonl", [GOOD, bad, GOOD])
    with pytest.raises(DataError) as error:
        build(source, tmp_path / "out", tokenizer, "--template", str(template))
    assert "a.jsonl: line 2" in str(error.value) and reason in str(error.value) and "remedy" in str(error.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    quarantine = ["--template", str(template), "--on-error", "quarantine"]
    manifest = build(source, tmp_path / "out", tokenizer, *quarantine)
    assert manifest.rejected == 1 and manifest.chat is not None and manifest.chat.conversations == 2
    rejected = json.loads((tmp_path / "out" / "parts" / "part_00000.rejected.jsonl").read_text())
    assert rejected["place"].startswith("line 2") and reason in rejected["reason"] and rejected["row"] == bad
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(DataError, match="more than 0 bad conversations"):
        build(source, tmp_path / "out", tokenizer, *quarantine, "--max-rejected", "0")


def test_an_id_beyond_the_vocabulary_is_named(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [turns("user", "assistant", content="\t"), GOOD])
    source = write(tmp_path / "a.jsonl", [turns("user", "assistant", content="a quick lazy dog B")])
    with pytest.raises(DataError, match=r"a.jsonl: line 1: id \d+ is beyond the vocabulary of 300"):
        build(source, tmp_path / "out", tokenizer, "--vocab-size", "300")


SAYS = "{% for m in messages %}{{ m.role + ':\n' }}"
MARKED = "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (SAYS + "{{ m.content }}{% endfor %}", "marks no answer"),
        ("{% for m in messages %}", "the template says"),
        (SAYS + "{% if m.role == 'assistant' %}{{ m.nothing.more }}{% endif %}{% endfor %}", "the template says"),
        (
            SAYS
            + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}"
            + "{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "does not end with a control token",
        ),
        (
            SAYS
            + "{% if m.role == 'assistant' and loop.last %}"
            + MARKED
            + "{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "of two answers: 1 answers marked",
        ),
        (
            "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}"
            + MARKED
            + "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
            "gives other ids than stand before its answer",
        ),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(
    tokenizer: Path, tmp_path: Path, template: str, reason: str
) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(template)
    with pytest.raises(DataError) as error:
        build(write(tmp_path / "a.jsonl", [GOOD]), tmp_path / "out", tokenizer, "--template", str(file))
    assert reason in str(error.value) and "mine.jinja" in str(error.value) and "remedy" in str(error.value)


def test_an_end_of_turn_of_its_own_is_found(tokenizer: Path, tmp_path: Path) -> None:
    """ChatML on a tokenizer with two added tokens, the line break after each turn inside the mark."""
    from data_tools.sources.sentencepiece_model import SentencepieceModel

    added = json.loads(SentencepieceModel(tokenizer).hugging_face())
    for name in ("<|im_start|>", "<|im_end|>"):
        token = {"id": 320 + len(added["added_tokens"]) - 3, "content": name, "special": True}
        added["added_tokens"].append({**added["added_tokens"][0], **token})
    (tmp_path / "tokenizer.json").write_text(json.dumps(added))
    (tmp_path / "chatml.jinja").write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    source = write(tmp_path / "a.jsonl", [GOOD])
    manifest = build(
        source, tmp_path / "out", tmp_path / "tokenizer.json", "--template", str(tmp_path / "chatml.jinja")
    )
    assert manifest.chat is not None
    assert (manifest.chat.end_of_turn, manifest.chat.end_of_turn_id, manifest.vocab_size) == ("<|im_end|>", 321, 322)
    with pytest.raises(DataError, match=r"line 1: id 32[01] is beyond the vocabulary of 320"):
        more = ["--template", str(tmp_path / "chatml.jinja"), "--vocab-size", "320"]
        build(source, tmp_path / "other", tmp_path / "tokenizer.json", *more)


@pytest.mark.parametrize(("policy", "truncated", "dropped"), [("truncate", 1, 1), ("drop", 0, 2)])
def test_what_is_longer_than_a_row_goes_by_the_policy(
    tokenizer: Path, tmp_path: Path, policy, truncated, dropped
) -> None:
    long = "fox " * 200
    answered = {"instruction": "fox?", "output": long}
    asked = {"instruction": long, "output": "fox"}  # cut, none of its answer would be left
    source = write(tmp_path / "a.jsonl", [answered, GOOD, asked])
    chat = build(source, tmp_path / "out", tokenizer, "--overlong", policy).chat
    assert chat is not None and (chat.truncated, chat.dropped) == (truncated, dropped)
    assert [len(ids) for ids, _ in stored(tmp_path / "out")].count(ROW) == truncated


def test_what_is_held_out_is_not_trained_on_word_for_word(tokenizer: Path, tmp_path: Path) -> None:
    records = [{"instruction": f"fox {n % 20}?", "output": f"dog {n % 20}"} for n in range(60)]
    chat = build(write(tmp_path / "a.jsonl", records), tmp_path / "out", tokenizer, "--held-out-rows", "2").chat
    held = {ids for ids, _ in stored(tmp_path / "out", "held_out")}
    assert chat is not None and held and chat.dropped > 0
    assert not held & {ids for ids, _ in stored(tmp_path / "out")}
    with pytest.raises(DataError, match="fill no more than"):
        build(tmp_path / "a.jsonl", tmp_path / "more", tokenizer, "--held-out-rows", "1000")


def test_an_array_is_refused_with_the_way_to_lines(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", [GOOD])
    (tmp_path / "in" / "share.json").write_text(json.dumps([GOOD]))
    with pytest.raises(DataError, match=r"jq -c"):
        build(tmp_path / "in", tmp_path / "out", tokenizer)


@pytest.mark.parametrize(
    ("suffix", "at", "says"),
    [
        ("mask", 3, "digest"),
        ("starts", -ROW_BYTES, "row {last}: no conversation begins with its first id"),
        ("mask", -ROW_BYTES, "row {last}: an id counts with which a conversation begins"),
        ("mask", -1, "row {last}: marks behind the row's end"),
    ],
)
@pytest.mark.parametrize("block", [2, row_blocks.BLOCK_ROWS])
def test_verify_finds_damaged_marks(
    tokenizer: Path, tmp_path: Path, suffix: str, at: int, says: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_blocks, "BLOCK_ROWS", block)
    rows = build(write(tmp_path / "a.jsonl", [GOOD] * 40), tmp_path / "out", tokenizer).rows
    assert rows > 2 and verify(tmp_path / "out") == []
    path = tmp_path / "out" / f"segment_000.{suffix}"
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)
    faults = verify(tmp_path / "out")
    assert any(says.format(last=rows - 1) in fault for fault in faults), faults


def test_an_id_that_nothing_comes_before_does_not_count(tokenizer: Path, tmp_path: Path) -> None:
    """A template that leaves the first question out: the answer's first id has nothing by which it is predicted."""
    template = tmp_path / "first.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}" + MARKED + "{% elif not loop.first %}"
        "{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "left out"}, {"role": "assistant", "content": "the quick brown fox"}]
    encoded = ChatTokenizer(tokenizer, template).encode(messages)
    assert len(encoded.ids) > 2 and encoded.counted.tolist() == [False] + [True] * (len(encoded.ids) - 1)
