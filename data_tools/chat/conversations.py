"""Conversations from files in the usual shapes, each checked before a template sees it.

{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}      ShareGPT
{"instruction": "...", "input": "...", "output": "..."}                                      Alpaca; input optional
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from data_tools.files.digest import digest_stream
from data_tools.files.durable import errors_named
from data_tools.files.errors import DataError
from data_tools.files.plain_file import open_plain
from data_tools.sources.compressed import open_decompressed, unpacking_named
from data_tools.sources.documents import LONGEST_LINE, bad_text
from data_tools.sources.parquet import column_records
from data_tools.sources.source_files import PARQUET_SUFFIX, list_files

Message = dict[str, str]
SHAPES = ("messages", "conversations", "instruction", "input", "output")
"""The keys that are read."""

_SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
}


class Line(NamedTuple):
    """One conversation as it stands in its file."""

    place: str
    """Line number or Parquet row, counted from 1."""
    value: Any
    """The parsed JSON, or of a Parquet row a dict of those of `SHAPES` that it has."""
    raw: bytes
    reason: str = ""
    """Why it cannot be read; empty where it can."""


def conversation_files(path: Path) -> list[Path]:
    """The files of a folder, or the one named.

    Raises:
        DataError: there is none, or one is a JSON array.
    """
    if path.is_file():
        files = [path]
    else:
        files = list_files(path)
        if arrays := sorted(path.rglob("*.json")):
            files.append(arrays[0])
    for file in files:
        if file.suffix == ".json":
            raise DataError(
                "one JSON value, where one conversation a line is read",
                file=file,
                remedy=f"write it as JSON lines: jq -c '.[]' {file.name} > {file.stem}.jsonl",
            )
    return files


def read_lines(path: Path, digest: Any) -> Iterator[Line]:
    """The conversations of a file in order, unreadable ones included; `digest` takes the bytes as they are read.

    Raises:
        DataError: the file itself cannot be read, or a line is endless.
    """
    with errors_named(path):
        if path.name.endswith(PARQUET_SUFFIX):
            with open_plain(path) as stream:
                digest_stream(stream, digest)
            yield from _parquet_rows(path)
            return
        with unpacking_named(path, "fetch or copy the file again"), open_decompressed(path) as stream:
            number = 0
            while line := stream.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    remedy = "not a file of one conversation a line, or a damaged one: mend it or take it away"
                    raise DataError(
                        f"longer than {LONGEST_LINE} bytes", file=path, place=f"line {number}", remedy=remedy
                    )
                digest.update(line)
                if line.strip(b" \t\r\n"):
                    yield _json_line(line.rstrip(b"\n"), f"line {number}")


def _json_line(raw: bytes, place: str) -> Line:
    try:
        return Line(place, orjson.loads(raw), raw)
    except orjson.JSONDecodeError as error:
        return Line(f"{place} column {error.colno}", None, raw, error.msg)


def _parquet_rows(path: Path) -> Iterator[Line]:
    for number, row in enumerate(column_records(path, SHAPES), 1):
        raw = b"" if row is None else json.dumps(row, ensure_ascii=False, default=str).encode(errors="replace")
        yield Line(f"row {number}", row, raw, "" if row is not None else "a text is not UTF-8")


def messages_of(value: Any) -> list[Message]:
    """The messages of a conversation: perhaps a system's, then a user's and an assistant's in turn, none empty.

    Raises:
        ValueError: why it is none.
    """
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if value.get("messages") is not None:
        messages = [_message(m, "role", "content", {}) for m in _listed(value["messages"], "messages")]
    elif value.get("conversations") is not None:
        turns = _listed(value["conversations"], "conversations")
        # Data sets in this shape often write their keys in the other's way.
        messages = [
            _message(m, "role", "content", {})
            if isinstance(m, dict) and "from" not in m
            else _message(m, "from", "value", _SHAREGPT_ROLES)
            for m in turns
        ]
    elif value.get("instruction") is not None and value.get("output") is not None:
        asked = [value["instruction"], *([value["input"]] if value.get("input") else [])]
        for text in asked:
            _check_text(text, "user")
        messages = [
            {"role": "user", "content": "\n\n".join(asked)},
            _message({"role": "assistant", "content": value["output"]}, "role", "content", {}),
        ]
    else:
        raise ValueError("none of messages, conversations, instruction and output")
    _check_order([m["role"] for m in messages])
    return messages


def _listed(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is no list of messages")
    return value


def _message(value: Any, role_key: str, text_key: str, roles: dict[str, str]) -> Message:
    if not isinstance(value, dict) or role_key not in value or text_key not in value:
        raise ValueError(f"a message without {role_key} or {text_key}")
    role = value[role_key]
    role = roles.get(role, role) if isinstance(role, str) else role
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"a message of {role!r}; system, user and assistant are read")
    _check_text(value[text_key], role)
    return {"role": role, "content": value[text_key]}


def _check_text(text: Any, role: str) -> None:
    if reason := bad_text(text):
        raise ValueError(f"{reason}, in a message of the {role}")
    if not text.strip():
        raise ValueError(f"an empty message of the {role}")


def _check_order(roles: list[str]) -> None:
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != expected:
        at = next((i for i, pair in enumerate(zip(turns, expected, strict=False)) if pair[0] != pair[1]), len(expected))
        number = at + 1 + (len(roles) - len(turns))
        said = (
            "the last message is the user's"
            if turns and at == len(turns) - 1 and turns[at] == "user"
            else (f"message {number} is the {turns[at]}'s" if turns else "there is no user")
        )
        raise ValueError(f"roles in a wrong order: {said}; user and assistant take turns and the assistant ends")
