"""A small model for runtimes, its tokenizer, and what a float64 model says of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from pydoc_data import topics

import pytest
import sentencepiece
import torch

from megatron_patch.recipe import Recipe
from tests.convert.samples import MemoryWeights, small_recipe
from tests.convert.test_export import reference_logits

VOCAB_SIZE, PIECES = 1000, 960  # a model may have more ids than its tokenizer
PROMPTS = torch.randint(3, PIECES, (8, 12), generator=torch.Generator().manual_seed(9))
NEW_TOKENS = 64
EOS_ID = 2


def device_recipe(*overrides: str, name: str = "mobillama_05b") -> Recipe:
    """4 layers, 4 heads of 16; every row of a matrix is whole blocks of 32."""
    shape = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 96, "vocab_size": VOCAB_SIZE}
    return small_recipe(*(f"model.{key}={value}" for key, value in shape.items()), *overrides, name=name)


def device_weights(*overrides: str, name: str = "mobillama_05b") -> MemoryWeights:
    return MemoryWeights(device_recipe(*overrides, name=name), scale=0.05)


def sure_weights() -> MemoryWeights:
    """The head is the embedding, its ids moved by 7: whatever the layers add, the best id is best by far."""
    weights = device_weights()
    embedding = weights.whole["embedding.word_embeddings.weight"] * 20
    return replace(
        weights,
        changed={
            "embedding.word_embeddings.weight": embedding,
            "output_layer.weight": embedding.roll(7, 0) / 4 + weights.whole["output_layer.weight"],
        },
    )


def train_tokenizer(folder: Path) -> Path:
    """LLaMA's layout, on Python's documentation."""
    (folder / "text.txt").write_text("\n".join(text for _, text in sorted(topics.topics.items())))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=PIECES, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


def greedy(weights: MemoryWeights) -> torch.Tensor:
    """The float64 model's greedy continuation of every prompt, without EOS: ids [8, 64]."""
    rows = PROMPTS
    for _ in range(NEW_TOKENS):
        logits = reference_logits(weights, rows)[:, -1:]
        logits[..., EOS_ID] = float("-inf")
        rows = torch.cat([rows, logits.argmax(-1)], 1)
    return rows[:, PROMPTS.shape[1] :]


def log_probs(weights: MemoryWeights, rows: torch.Tensor) -> torch.Tensor:
    """The float64 model's log-probabilities of `rows` [b, s] after their first id: [b, s - 1]."""
    found = reference_logits(weights, rows).log_softmax(-1)
    return found[:, :-1].gather(-1, rows[:, 1:, None])[..., 0]


@pytest.fixture(scope="session")
def device_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("device_tokenizer"))
