"""The embedding's gradient against float64: many occurrences of a token, added in fp32."""

import pytest
import torch

from megatron_patch.parallel import device
from tests.ranks import run_ranks
from tests.toy import toy_recipe, toy_trainer


def embedding_gradient(*overrides: str):
    """On a rank: (main_grad, the exact gradient) of its part of a model's embedding after two micro-batches."""
    trainer = toy_trainer(toy_recipe("precision=bf16", *overrides))
    module = trainer.chunks[0].embedding.word_embeddings
    generator = torch.Generator().manual_seed(0)
    exact = torch.zeros(trainer.recipe.model.vocab_size, module.weight.shape[1], dtype=torch.float64)
    for _ in range(2):
        ids = torch.randint(len(exact), (4, 2048), generator=generator)
        ids[:, ::2] = 3  # the commonest token
        upstream = (torch.rand(*ids.shape, exact.shape[1], generator=generator) + 0.1).bfloat16()
        module(ids.to(device.current())).backward(upstream.to(device.current()))
        exact.index_add_(0, ids.flatten(), upstream.flatten(0, 1).double())
    assert module.weight.grad is None
    mine = slice(module.vocab_start_index, module.vocab_end_index)
    return module.weight.main_grad.cpu(), exact[mine]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("deterministic", ["true", "false"])
def test_occurrences_add_up_in_fp32(ranks, deterministic):
    layout = [f"parallel.tensor={ranks}", f"run.deterministic={deterministic}"]
    for got, exact in run_ranks(ranks, embedding_gradient, *layout):
        assert (got - exact).norm() < 1e-6 * exact.norm()
