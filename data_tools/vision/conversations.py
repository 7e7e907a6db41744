"""Conversations about images, in LLaVA's form, each checked before template and images are looked at.

    [{"id": "...", "image": "coco/train2017/000000033471.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhich colour is it?"}, {"from": "gpt", "value": "White."}]}]

One JSON array, or an object a line. `image` may be a list, and be missing where a conversation is of text alone;
`messages` and the other shapes of `chat/conversations.py` are read too. `<image>` stands where an image is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import orjson

from data_tools.chat.conversations import Line, Message, messages_of, read_lines
from data_tools.files.durable import errors_named
from data_tools.files.errors import DataError

IMAGE_TEXT = "<image>"


class Asked(NamedTuple):
    """A conversation that is one."""

    messages: list[Message]
    """With `IMAGE_TEXT` where images are."""
    images: list[str]
    """Their paths below the folder of images, in the order in which they are spoken of."""


def read_entries(path: Path, digest: Any) -> Iterator[Line]:
    """The entries of a JSON array, or of a file of one a line, unreadable ones included; `digest` takes the bytes.

    Those of an array come without their bytes.

    Raises:
        DataError: the file cannot be read, or is a JSON value of another kind.
    """
    if path.suffix != ".json":
        yield from read_lines(path, digest)
        return
    with errors_named(path):
        content = path.read_bytes()
    digest.update(content)
    try:
        entries = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise DataError(
            f"not JSON ({error.msg})", file=path, place=place, remedy="fetch or copy the file again"
        ) from None
    del content
    if not isinstance(entries, list):
        raise DataError("no JSON array", file=path, remedy="LLaVA's files are lists of conversations")
    for number, value in enumerate(entries, 1):
        yield Line(f"entry {number}", value, b"")


def asked_of(value: Any) -> Asked:
    """Messages and images of an entry. A single image is spoken of first, as LLaVA trains.

    Raises:
        ValueError: why it is no conversation about images.
    """
    images = _paths(value)
    messages = messages_of({key: item for key, item in value.items() if key != "image"})
    spoken = [message["content"].count(IMAGE_TEXT) for message in messages]
    if sum(spoken) != len(images):
        raise ValueError(f"{IMAGE_TEXT} stands {sum(spoken)} times in it, and it names {len(images)} images")
    if any(count for count, message in zip(spoken, messages, strict=True) if message["role"] != "user"):
        raise ValueError(f"{IMAGE_TEXT} in a message that is not the user's")
    if len(images) == 1:
        messages = [_image_first(message) for message in messages]
    return Asked(messages, images)


def _image_first(message: Message) -> Message:
    if IMAGE_TEXT not in message["content"]:
        return message
    rest = message["content"].replace(IMAGE_TEXT, "").strip()
    return {**message, "content": f"{IMAGE_TEXT}\n{rest}".strip()}


def _paths(value: Any) -> list[str]:
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    named = value.get("image")
    if named is None or named == []:
        return []
    paths = named if isinstance(named, list) else [named]
    for path in paths:
        if not isinstance(path, str) or not path.strip() or "\0" in path:
            raise ValueError(f"image {path!r} is no path")
        parts = PurePosixPath(path).parts
        if path.startswith("/") or ".." in parts:
            raise ValueError(f"image {path!r} leads out of the folder of images")
    return [PurePosixPath(path).as_posix() for path in paths]
