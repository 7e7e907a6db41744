"""Rows of docs/errata.md that no other test proves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data_tools.dataset.format import TABLE_2_BILLION_TOKENS
from megatron_patch import paper

IDS_A_ROW, ROWS_A_SEGMENT, SEGMENTS = 2049, 1_706_976, 360
BATCH, INPUTS = 160 * 5, 2048


def stock_parameters(**options: int) -> int:
    """Of a stock LlamaForCausalLM, which has an FFN in each layer; of the paper's large-base without `options`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    config = LlamaConfig(vocab_size=32_000, tie_word_embeddings=False, **{**shape, **options})
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())


def test_parameters_counted_from_stock_llama() -> None:
    """Rows 1, 7, 8, 9, 24, 25. `num_key_value_heads` is what decides row 1: stock Llama obeys it."""
    ffn = 3 * 2048 * 5632
    large_base = stock_parameters()
    assert large_base == 1_261_529_088
    assert large_base - 21 * ffn == 534_865_920
    assert stock_parameters(num_key_value_heads=4) - 21 * ffn == 373_385_216
    assert stock_parameters(num_hidden_layers=8) == 542_148_608
    baseline1 = [stock_parameters(hidden_size=1024, num_attention_heads=heads) for heads in (16, 32)]
    assert baseline1 == [538_489_856] * 2
    narrow = stock_parameters(num_hidden_layers=8, intermediate_size=5181)
    assert narrow < 0.52e9 < narrow + 8 * 3 * 2048
    embedding, attention = 32_000 * 2048, 22 * 4 * 2048**2
    shares = [round(100 * part / large_base, 1) for part in (22 * ffn, attention, 2 * embedding, 21 * ffn)]
    assert shares == [60.3, 29.3, 10.4, 57.6]
    papers = [round(100 * part / large_base) for part in (22 * ffn + embedding, attention, embedding)]
    assert papers == [66, 29, 5], "the paper's 65, 30 and 5 to the nearest five"
    assert round(4 * large_base / 1e9, 2) == 5.05


def test_figures_of_the_text_follow_from_its_others() -> None:
    """Rows 10, 16, 20, 23, 36, 37."""
    steps = ROWS_A_SEGMENT // BATCH
    assert (steps, ROWS_A_SEGMENT % BATCH, steps * SEGMENTS) == (2133, 576, 767_880)
    assert [round(n * BATCH * INPUTS / 1e9, 3) for n in (steps, 2000)] == [3.495, 3.277]
    assert -(-100_000_000_000 // (BATCH * INPUTS)) == 61_036
    trained = steps * SEGMENTS * BATCH * INPUTS
    assert round(trained / 1e9, 2) == 1258.09
    hours = {row.recipe: row.gpu_hours for row in paper.TABLE_1}
    assert round(1 - hours["mobillama_05b"] / hours["large_base"], 2) == 0.42
    assert round(trained / (hours["mobillama_05b"] * 3600), -2) == 13_100


def test_rotary_caches_in_bf16_are_off_by_up_to_half_a_unit() -> None:
    """Row 40: bf16 has 8 bits, so what lies between 1/2 and 1 moves by up to 2^-9."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    caches = LlamaRotaryEmbedding(LlamaConfig(hidden_size=2048, num_attention_heads=32))
    exact = caches(torch.zeros(1), torch.arange(INPUTS)[None])
    for angle in exact:
        moved = (angle.to(torch.bfloat16).float() - angle).abs().max().item()
        assert 0.99 * 2**-9 < moved <= 2**-9


def test_table_2_is_rounded_row_by_row() -> None:
    """Row 18: the total counts every id of every row; its seven summands are rounded to 0.01B each."""
    total = SEGMENTS * ROWS_A_SEGMENT * IDS_A_ROW
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
