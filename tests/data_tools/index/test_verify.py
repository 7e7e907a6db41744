"""`verify` on what `index` wrote and something then damaged: which segment, row and byte."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.files.errors import DataError
from data_tools.files.json_file import sealed
from data_tools.index.verify import verify
from tests.data_tools.conftest import build_amber
from tests.data_tools.small_segments import ROW_LENGTH, ROWS, index, write_segments


@pytest.fixture
def amber(tmp_path: Path) -> Path:
    return write_segments(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "at", "says"),
    [
        ("bin", 2 * (7 * ROW_LENGTH + 4) + 1, "segment_001.bin: row 7 id 4 byte 134: id"),
        ("bin", 0, "segment_001.bin: digest"),
        ("src", 12, "segment_001.src: row 12 byte 12: 255 is no source"),
        ("idx", 100, "segment_001.idx: byte 100: not the index of its rows"),
        ("json", None, "segment_001.json"),
        ("counts", None, "segment_001.json: a field has the wrong type"),
        ("digests", None, "segment_001.json: digests of ['idx', 'other', 'src']"),
        ("cut", None, "segment_001.bin: size: 898 bytes, but 50 rows of 9 ids need 900"),
    ],
)
def test_verify_says_which_segment_row_and_byte(amber: Path, suffix: str, at: int | None, says: str) -> None:
    index(amber)
    out = amber.parent / "out"
    if suffix == "json":
        path = out / "segment_001.json"
        path.write_text(path.read_text().replace('"rejected": 0', '"rejected": 1'))
    elif suffix in ("counts", "digests"):
        path = out / "segment_001.json"
        text = re.sub(r'"arxiv": (\d+)', r'"arxiv": "\1"', path.read_text())
        path.write_text(text if suffix == "counts" else path.read_text().replace('"bin":', '"other":'))
    elif suffix == "cut":
        path = out / "segment_001.bin"
        path.write_bytes(path.read_bytes()[:-2])
    else:
        path = out / f"segment_001.{suffix}"
        content = bytearray(path.read_bytes())
        content[at] = 0xFF if suffix != "bin" or at else content[at] ^ 1
        path.write_bytes(content)
    result = build_amber("verify", "--input", out, check=False)
    assert result.returncode == 1
    assert says in result.stderr
    assert "segment_000" not in result.stderr


@pytest.mark.parametrize(
    "change",
    [{"num_segments": 0}, {"num_segments": "3"}, {"rows_per_segment": -1}, {"segments": []}, {"rows_per_source": []}],
)
def test_a_manifest_whose_numbers_are_not_those_of_its_segments_is_refused(amber: Path, change: dict[str, Any]) -> None:
    index(amber)
    path = amber.parent / "out" / "manifest.json"
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), **change})))
    with pytest.raises(DataError, match=r"manifest\.json: its numbers are not those of its segments"):
        verify(path.parent)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (7, 4), (ROWS - 1, ROW_LENGTH - 1)])
def test_verify_against_the_jsonl_names_the_row_whose_id_is_another(
    amber: Path, row: int, column: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.index.segment_reader.BLOCK_BYTES", 1024)  # the segment is several blocks
    index(amber)
    out = amber.parent / "out"
    build_amber("verify", "--input", out, "--against", amber)
    path = out / "segment_001.bin"
    content = bytearray(path.read_bytes())
    at = 2 * (row * ROW_LENGTH + column)
    content[at] ^= 1
    path.write_bytes(content)
    digest, differs = verify(out, against=amber)
    assert f"segment_001.bin: row {row} id {column} byte {at}: id" in differs
    assert "segment_001.bin: digest" in digest


def test_verify_knows_how_many_segments_there_are(amber: Path) -> None:
    index(amber)
    result = build_amber("verify", "--input", amber.parent / "out", "--segment", "2-3", check=False)
    assert (result.returncode, "no segment 3: there are 3" in result.stderr) == (1, True)


def test_verify_finds_any_flipped_bit_and_names_its_file_and_byte(amber: Path) -> None:
    index(amber)
    out = amber.parent / "out"
    random = np.random.RandomState(0)
    for suffix in ("bin", "src", "idx", "json"):
        path = out / f"segment_001.{suffix}"
        sound = path.read_bytes()
        for at in random.permutation(len(sound))[:40]:
            flipped = bytearray(sound)
            flipped[at] ^= 1 << random.randint(8)
            path.write_bytes(flipped)
            faults = verify(out, against=amber)
            assert faults and all(fault.startswith(f"{path}: ") for fault in faults), (suffix, at)
            byte = at // 2 * 2 if suffix == "bin" else at
            damaged_json = (
                suffix == "json" and "differs from" not in faults[0]
            )  # no manifest any more: its reason is said
            assert damaged_json or any(f"byte {byte}:" in fault for fault in faults), (suffix, at, faults)
        path.write_bytes(sound)
    assert verify(out, against=amber) == []
