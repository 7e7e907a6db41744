"""Rows of docs/errata.md that no other test proves."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_tools.dataset.format import TABLE_2_BILLION_TOKENS


def test_table_2_is_rounded_row_by_row() -> None:
    """Row 18: the total counts every id of every row; its seven summands are rounded to 0.01B each."""
    total = 360 * 1_706_976 * 2049
    assert (total, round(total / 1e9, 2)) == (1_259_133_776_640, 1259.13)
    assert round(sum(TABLE_2_BILLION_TOKENS.values()), 2) == 1259.11
    assert abs(total / 1e9 - 1259.11) < len(TABLE_2_BILLION_TOKENS) * 0.005


def test_the_stock_dataset_drifts_by_an_id_a_row(tmp_path: Path) -> None:
    """Row 29: Megatron's GPTDataset strides by the row's inputs over rows that have one id more."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

    inputs, rows = 16, 40
    ids = np.arange(rows * (inputs + 1), dtype=np.uint16).reshape(rows, inputs + 1)
    builder = IndexedDatasetBuilder(str(tmp_path / "rows.bin"), dtype=DType.optimal_dtype(65_000))
    for row in ids:
        builder.add_document(row, [len(row)])
    builder.finalize(str(tmp_path / "rows.idx"))

    class Tokenizer:
        unique_identifiers = {"of": "ids"}  # noqa: RUF012
        eod, pad, vocab_size = 65_000, 65_001, 65_002

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=inputs, split="1,0,0", tokenizer=Tokenizer(), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False, path_to_cache=str(tmp_path),
    )  # fmt: skip
    stock = GPTDataset(
        IndexedDataset(str(tmp_path / "rows")), str(tmp_path / "rows"), np.arange(rows, dtype=np.int32), None,
        Split.train, config,
    )  # fmt: skip
    documents = stock.document_index
    stream = ids[documents].reshape(-1)
    by_place = {int(stock.shuffle_index[i]): stock[i]["tokens"].numpy() for i in range(len(stock))}
    assert len(by_place) > rows, "more samples than rows"
    for place, tokens in by_place.items():
        assert tokens.tolist() == stream[place * inputs : (place + 1) * inputs].tolist()
    begins_a_row = [place for place in by_place if by_place[place][0] % (inputs + 1) == 0]
    assert begins_a_row == [place for place in by_place if place % (inputs + 1) == 0], "all others begin inside one"
