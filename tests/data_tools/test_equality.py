"""Rows, segments and binaries of the demo corpus are byte-equal to the slow reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.pack.mix import jsonl_name
from tests.data_tools.conftest import build_amber
from tests.data_tools.reference import reference_files, reference_jsonl, reference_rows, reference_segments

ROW_LENGTH, NUM_SEGMENTS = 129, 3


@pytest.fixture(scope="module")
def built(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    tokenizer = corpus / "tokenizer.model"
    build_amber("tokenize", "--input", corpus, "--output", folder / "rows", "--tokenizer", tokenizer,
                "--row-length", ROW_LENGTH, "--workers", 2)  # fmt: skip
    build_amber("mix", "--input", folder / "rows", "--output", folder / "segments", "--num-segments", NUM_SEGMENTS)
    build_amber("mix", "--input", folder / "rows", "--output", folder / "direct", "--num-segments", NUM_SEGMENTS,
                "--direct")  # fmt: skip
    build_amber("index", "--input", folder / "segments", "--output", folder / "indexed")
    return folder


def test_everything_is_what_the_reference_gives(corpus: Path, built: Path) -> None:
    rows, left_over = reference_rows(corpus, (corpus / "tokenizer.json").read_text(), ROW_LENGTH)
    for source in ("starcoderdata", "stackexchange", "wikipedia"):
        manifest = json.loads((built / "rows" / source / "source.json").read_text())
        stream = b"".join(
            (built / "rows" / source / f"{part['name']}.tokens").read_bytes() for part in manifest["parts"]
        )
        ours = np.frombuffer(stream, "<u2")[: manifest["rows"] * ROW_LENGTH].reshape(-1, ROW_LENGTH)
        np.testing.assert_array_equal(ours, [ids for ids, name in rows if name == source])
        assert manifest["tail_tokens"] == left_over[source]
        assert len((built / "rows" / source / "tail.tokens").read_bytes()) == 2 * left_over[source]
    segments = reference_segments(rows, NUM_SEGMENTS)
    for k, segment in enumerate(segments):
        assert (built / "segments" / jsonl_name(k)).read_bytes() == reference_jsonl(segment)
        for suffix, content in reference_files(segment, ROW_LENGTH).items():
            for folder in ("indexed", "direct"):
                assert (built / folder / f"segment_{k:03d}.{suffix}").read_bytes() == content, (folder, k, suffix)
    manifest = json.loads((built / "indexed" / "manifest.json").read_text())
    assert manifest["rows"] == sum(map(len, segments))
    assert manifest["dropped_rows"] == len(rows) - manifest["rows"]


@pytest.mark.parametrize("folder", ["indexed", "direct"])
def test_verify_finds_nothing_and_stats_adds_up(built: Path, folder: str) -> None:
    assert "all is as the manifest says" in build_amber("verify", "--input", built / folder).stdout
    table = build_amber("stats", "--input", built / folder).stdout
    rows = json.loads((built / folder / "manifest.json").read_text())["rows"]
    assert f"total{rows:>23,}" in table


def test_stock_indexed_dataset_reads_the_rows(built: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    stock = IndexedDataset(str(built / "indexed" / "segment_000"))
    lines = (built / "segments" / "train_000.jsonl").read_text().splitlines()
    assert len(stock) == len(lines)
    for i in (0, 1, len(lines) // 2, len(lines) - 1):
        assert stock[i].tolist() == json.loads(lines[i])["token_ids"]
