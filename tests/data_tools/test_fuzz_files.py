"""Damaged files: each row is judged as Python judges it, each bad one set aside untouched, nothing crashes."""

from __future__ import annotations

import base64
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.dataset.format import AMBER_SOURCES
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.index import segment_reader
from data_tools.index.segment_reader import SegmentReader
from tests.data_tools.slow_row import slow_row

ROW_LENGTH, VOCAB = 6, 1000
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "800")),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_reader, "BLOCK_BYTES", 256)


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A few rows with bytes flipped, cut out, inserted or moved, newlines among them."""
    rows = draw(st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=ROW_LENGTH, max_size=ROW_LENGTH), max_size=12))
    lines = [json.dumps({"token_ids": ids, "source": AMBER_SOURCES[i % 7]}).encode() for i, ids in enumerate(rows)]
    content = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"])).join(lines) + draw(st.sampled_from([b"", b"\n"]))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 40)))
        piece = draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"\n", content[start:stop][::-1], content[:50]]))
        )
        content = content[:start] + piece + content[stop:]
    return content


def read(path: Path, threads: int = 1) -> tuple[list[list[int]], list[int], list[bytes], list[int]]:
    """Ids, codes, rejected lines and their numbers."""
    reader = SegmentReader(path, ROW_LENGTH, VOCAB, ErrorPolicy(True, 10**9), AMBER_SOURCES, threads)
    ids = [block.copy() for block in reader.blocks()]
    rejected = [json.loads(line) for line in reader.rejected]
    lines = [entry["row"].encode() if "row" in entry else base64.b64decode(entry["row_base64"]) for entry in rejected]
    assert all(entry["column"] and entry["reason"] for entry in rejected)
    rows = np.concatenate([*ids, np.empty(0, "<u2")]).reshape(-1, ROW_LENGTH).tolist()
    return rows, list(b"".join(reader.codes)), lines, [entry["line"] for entry in rejected]


@FUZZ
@given(content=damaged_files(), threads=st.sampled_from([1, 2]))
def test_every_line_is_taken_or_set_aside_untouched(tmp_path: Path, content: bytes, threads: int) -> None:
    path = tmp_path / "train_000.jsonl"
    path.write_bytes(content)
    expected: tuple[list[list[int]], list[int], list[bytes], list[int]] = ([], [], [], [])
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip(b" \t\r"):
            continue
        row = slow_row(line, ROW_LENGTH, VOCAB, AMBER_SOURCES)
        if row is None:
            expected[2].append(line)
            expected[3].append(number)
        else:
            expected[0].append(row[0])
            expected[1].append(AMBER_SOURCES.index(row[1]))
    try:
        assert read(path, threads) == expected
    except DataError as error:  # a first byte that makes it another form's file
        assert "its name says plain text" in str(error) and content[:1] not in (b"{", b"[")


@FUZZ
@given(
    content=damaged_files(), where=st.floats(0, 1), byte=st.integers(0, 255), cut=st.integers(0, 12), kind=st.booleans()
)
def test_a_damaged_compressed_file_is_refused_or_gives_its_bytes(
    tmp_path: Path, content: bytes, where: float, byte: int, cut: int, kind: bool
) -> None:
    plain = tmp_path / "train_000.jsonl"
    plain.write_bytes(content)
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    packed = compressor.compress(content) if kind else gzip.compress(content, mtime=0)
    at = int(where * (len(packed) - 1))
    damaged = packed[:at] + (bytes([byte]) if cut == 0 else b"") + packed[at + max(cut, 1) :]
    path = tmp_path / f"train_000.jsonl.{'zst' if kind else 'gz'}"
    path.write_bytes(damaged)
    try:
        rows = read(path)
    except DataError as error:
        assert str(path) in str(error)
        return
    # Unnoticed damage is damage that changed nothing: a header field, or the whole file cut away.
    assert rows == read(plain) or not damaged
