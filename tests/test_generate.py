"""Sampling from a model whose vocabulary is larger than its tokenizer's."""

import io

import pytest
import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from megatron_patch.generate import sample

MODEL_VOCABULARY = 64


class Prefers(torch.nn.Module):
    """All but certain of one token, whatever came before."""

    def __init__(self, token: int) -> None:
        super().__init__()
        self.token, self.calls = token, 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        logits = torch.zeros(*tokens.shape, MODEL_VOCABULARY)
        logits[..., self.token] = 50.0
        return logits


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceProcessor:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 20), model_writer=model, vocab_size=15, minloglevel=2
    )
    return SentencePieceProcessor(model_proto=model.getvalue())


def test_a_token_without_a_text_is_never_drawn(tokenizer: SentencePieceProcessor) -> None:
    text = sample(Prefers(MODEL_VOCABULARY - 1), tokenizer, "the cat", num_tokens=12, sequence_length=8)
    assert text.startswith("the cat") and len(text) > len("the cat")


def test_the_preferred_token_is_drawn_and_eos_ends_the_text(tokenizer: SentencePieceProcessor) -> None:
    token = tokenizer.encode("a")[-1]
    text = sample(Prefers(token), tokenizer, "the cat", num_tokens=3, sequence_length=8)
    assert text == tokenizer.decode([*tokenizer.encode("the cat"), token, token, token])
    model = Prefers(tokenizer.eos_id())
    ended = sample(model, tokenizer, "the cat", num_tokens=3, sequence_length=8)
    assert (ended, model.calls) == ("the cat", 1)  # EOS has no text: a text that goes on after it looks the same
