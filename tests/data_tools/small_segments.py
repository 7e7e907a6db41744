"""Three segments of short rows, and `index` of them: what the tests of `index`, `merge` and `verify` share."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import zstandard

from data_tools.dataset.format import AMBER_SOURCES
from tests.data_tools.conftest import build_amber

ROW_LENGTH, ROWS = 9, 50


def lines_of(seed: int) -> list[bytes]:
    random = np.random.RandomState(seed)
    return [
        json.dumps(
            {"token_ids": random.randint(0, 32000, ROW_LENGTH).tolist(), "source": AMBER_SOURCES[i % 7]}
        ).encode()
        for i in range(ROWS)
    ]


def ids_of(lines: list[bytes]) -> list[list[int]]:
    return [json.loads(line)["token_ids"] for line in lines]


def write_segments(parent: Path) -> Path:
    """PARENT/amber: three segments with Amber's two ways of naming them, plain, gz and zst."""
    folder = parent / "amber"
    folder.mkdir()
    content = [b"\n".join(lines_of(k)) + b"\n" for k in range(3)]
    (folder / "train_0.jsonl").write_bytes(content[0])
    (folder / "train_001.jsonl.gz").write_bytes(gzip.compress(content[1][:1000]) + gzip.compress(content[1][1000:]))
    compressor = zstandard.ZstdCompressor()
    (folder / "train_002.jsonl.zst").write_bytes(
        compressor.compress(content[2][:900]) + compressor.compress(content[2][900:])
    )
    return folder


def index(amber: Path, *more: object, check: bool = True):
    return build_amber(
        "index", "--input", amber, "--output", amber.parent / "out", "--row-length", ROW_LENGTH, *more, check=check
    )


def stored_ids(base: Path) -> list[list[int]]:
    return np.fromfile(base.with_suffix(".bin"), "<u2").reshape(-1, ROW_LENGTH).tolist()
