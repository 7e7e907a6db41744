"""A small MobiLlama in memory, its recipe and a tokenizer that fits it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import sentencepiece
import torch

from megatron_patch.model.parameters import whole_tensors
from megatron_patch.recipe import Recipe, load

RECIPES = Path(__file__).parents[2] / "recipes"
VOCAB_SIZE = 320


def small_recipe(*overrides: str, name: str = "mobillama_05b") -> Recipe:
    """3 layers, 4 heads of 8; FFN shared as in the named recipe."""
    shape = {"num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4}
    settings = [f"model.{key}={value}" for key, value in {**shape, "vocab_size": VOCAB_SIZE}.items()]
    return load(RECIPES / f"{name}.yaml", [*settings, "model.sequence_length=256", "precision=fp32", *overrides])


@dataclass
class MemoryWeights:
    """Weights drawn from a seed; the same interface as a checkpoint."""

    recipe: Recipe
    seed: int = 3
    scale: float = 0.2
    dtype: torch.dtype = torch.float32
    step: int = 2133
    samples: int = 2133 * 800
    tokens: int = 2133 * 800 * 2048
    digest: str = "5eed"
    data_digest: str | None = "da7a"
    changed: dict[str, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def whole(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {
            name: (torch.randn(t.shape, generator=generator) * self.scale + (t.kind == "norm")).to(self.dtype)
            for name, t in whole_tensors(self.recipe.model).items()
        }

    def tensor(self, name: str) -> torch.Tensor:
        return self.changed.get(name, self.whole[name])


def train_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> Path:
    """A LLaMA-like sentencepiece BPE with byte fallback and whole-text coverage of its few words."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and asks: Question Answer Article, A. B. C. D.\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=vocab_size, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, hard_vocab_limit=True, minloglevel=2,
    )  # fmt: skip
    text.unlink()
    return folder / "tokenizer.model"
