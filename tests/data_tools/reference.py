"""The paper's procedure (section 3.3) in plain Python, slow and obvious: what the tools' bytes are compared with."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import tokenizers

from data_tools.dataset.format import AMBER_SOURCES


def reference_rows(
    raw: Path, tokenizer_json: str, row_length: int
) -> tuple[list[tuple[list[int], str]], dict[str, int]]:
    """Rows with their source, in the paper's order of sources; and the ids left over after each source's last row."""
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    eos = tokenizer.token_to_id("</s>")
    rows, left_over = [], {}
    for source in AMBER_SOURCES:
        buffer: list[int] = []
        for path in sorted((raw / source).glob("*.jsonl")) if (raw / source).is_dir() else []:
            for line in path.read_text(encoding="utf-8").split("\n"):
                if line:
                    buffer += [*tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids, eos]
        whole = len(buffer) // row_length
        rows += [(buffer[i * row_length : (i + 1) * row_length], source) for i in range(whole)]
        left_over[source] = len(buffer) - whole * row_length
    return rows, left_over


def reference_segments(rows: list[tuple[list[int], str]], num_segments: int) -> list[list[tuple[list[int], str]]]:
    """Rows distributed round-robin, the remainder dropped so that all segments are equal."""
    kept = rows[: len(rows) // num_segments * num_segments]
    return [kept[k::num_segments] for k in range(num_segments)]


def reference_jsonl(segment: list[tuple[list[int], str]]) -> bytes:
    """Amber's JSONL."""
    return b"".join(json.dumps({"token_ids": ids, "source": source}).encode() + b"\n" for ids, source in segment)


def reference_files(segment: list[tuple[list[int], str]], row_length: int) -> dict[str, bytes]:
    """The indexed binary: `.bin`, `.src` and Megatron-Core's `.idx`."""
    count = len(segment)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, count, count + 1)
    index += b"".join(struct.pack("<i", row_length) for _ in range(count))
    index += b"".join(struct.pack("<q", i * row_length * 2) for i in range(count))
    index += b"".join(struct.pack("<q", i) for i in range(count + 1))
    return {
        "bin": b"".join(struct.pack(f"<{row_length}H", *ids) for ids, _ in segment),
        "src": bytes(AMBER_SOURCES.index(source) for _, source in segment),
        "idx": index,
    }
