"""What a chat model's export needs of the data set that it was tuned on: the template, and which token ends a turn."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from data_tools.dataset.format import CHAT_TEMPLATE_NAME, MANIFEST_NAME, DatasetManifest
from data_tools.files.digest import sha256_file
from megatron_patch.convert.source import ConvertError


class Chat(NamedTuple):
    template: str
    end_of_turn: str


def chat_beside(tokenizer: Path) -> Chat | None:
    """Of the data set of conversations that a tokenizer lies in; None where it lies in none.

    Raises:
        ConvertError: the template is not the one that made the data.
        DataError: the data set's manifest cannot be read.
    """
    template, manifest = tokenizer.with_name(CHAT_TEMPLATE_NAME), tokenizer.with_name(MANIFEST_NAME)
    chat = DatasetManifest.read(manifest).chat if manifest.is_file() else None
    if chat is None:
        return None
    if not template.is_file() or sha256_file(template) != chat.template_sha256:
        raise ConvertError(f"{template}: missing, or not the template that made the data; copy the right one back")
    return Chat(template.read_text(encoding="utf-8"), chat.end_of_turn)
