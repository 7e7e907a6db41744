"""A data set that does not fit is refused before the first step; one that fits gives its rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.files.errors import DataError
from megatron_patch.data.segments import open_segments
from tests.data.conftest import NUM_SEGMENTS, ROW_LENGTH, ROWS, VOCAB


def test_rows_come_back(data_set) -> None:
    folder, rows, held_out = data_set
    segments = open_segments(folder, row_length=ROW_LENGTH, vocab_size=VOCAB)
    assert (segments.num_segments, segments.rows_per_segment, segments.held_out_rows) == (NUM_SEGMENTS, ROWS, 7)
    wanted = np.array([3, 0, 24, 3])
    for k in (0, 2, 1):
        np.testing.assert_array_equal(segments.read(k, wanted), rows[k][wanted])
        np.testing.assert_array_equal(segments.sources(k, wanted), wanted % 7)
    np.testing.assert_array_equal(segments.read_held_out(np.array([6, 1])), held_out[[6, 1]])
    assert segments.tokenizer_path == folder / "tokenizer.json"


def test_stock_indexed_dataset_reads_the_rows(data_set) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    folder, rows, _ = data_set
    stock = IndexedDataset(str(folder / "segment_001"))
    assert len(stock) == ROWS
    assert stock.document_indices.tolist() == list(range(ROWS + 1))
    for i in range(ROWS):
        np.testing.assert_array_equal(stock[i], rows[1][i])


def test_digest_names_the_content(data_set) -> None:
    folder, *_ = data_set
    digest = open_segments(folder, row_length=ROW_LENGTH, vocab_size=VOCAB).digest
    assert digest == json.loads((folder / "manifest.json").read_text())["digest"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def edit_manifest(path: Path) -> None:
    path.write_text(path.read_text().replace('"dropped_rows": 0', '"dropped_rows": 1'))


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("segment_001.bin", Path.unlink, "no such file"),
        ("segment_001.bin", cut, "bytes, but the manifest's 25 rows need"),
        ("segment_002.src", cut, "bytes, but the manifest's 25 rows need"),
        ("segment_000.idx", cut, "need"),
        ("segment_000.idx", lambda path: path.write_bytes(b"x" * 10), "too short"),
        ("held_out.bin", cut, "need"),
        ("tokenizer.json", Path.unlink, "no such file"),
        ("tokenizer.json", lambda path: path.write_text("[]"), "not the tokenizer"),
        ("manifest.json", Path.unlink, "no such file"),
        ("manifest.json", edit_manifest, "does not match its own digest"),
        ("manifest.json", lambda path: path.write_text("{"), "not JSON"),
    ],
)
def test_damage_is_refused_with_the_file_and_a_remedy(data_set, name: str, damage, says: str) -> None:
    folder, *_ = data_set
    damage(folder / name)
    with pytest.raises(DataError, match=says) as error:
        open_segments(folder, row_length=ROW_LENGTH, vocab_size=VOCAB)
    assert name in str(error.value)
    assert "remedy:" in str(error.value)


def test_a_data_set_for_another_model_is_refused(data_set) -> None:
    folder, *_ = data_set
    with pytest.raises(DataError, match="rows of 9 ids, but a sequence length of 2048 needs 2049"):
        open_segments(folder, row_length=2049, vocab_size=VOCAB)
    with pytest.raises(DataError, match="vocabulary of 64, but the model has 63"):
        open_segments(folder, row_length=ROW_LENGTH, vocab_size=63)
    open_segments(folder, row_length=ROW_LENGTH, vocab_size=100)  # a larger model is no harm


def test_an_id_beyond_the_vocabulary_is_named_by_its_row(data_set) -> None:
    folder, rows, _ = data_set
    damaged = rows[1].copy()
    damaged[3, 5] = 65000
    (folder / "segment_001.bin").write_bytes(damaged.tobytes())
    segments = open_segments(folder, row_length=ROW_LENGTH, vocab_size=VOCAB)
    np.testing.assert_array_equal(segments.read(1, np.array([2, 4])), rows[1][[2, 4]])
    with pytest.raises(DataError, match=r"segment_001.bin: row 3, position 5: id 65000 is beyond the vocabulary of 64"):
        segments.read(1, np.array([2, 3]))
