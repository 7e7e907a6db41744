"""Load a trained model whole, and continue a text with it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
from sentencepiece import SentencePieceProcessor

from megatron_patch.model.build import build
from megatron_patch.model.initialise import fill
from megatron_patch.parallel import device, topology
from megatron_patch.recipe import Recipe


def load_model(recipe: Recipe, tensor: Callable[[str], torch.Tensor], patience: timedelta) -> torch.nn.Module:
    """The model whole on every rank, in whatever layout it was trained, in the recipe's precision.

    `tensor` gives whole tensors by name (model/parameters.py), `patience` is how long one rank may keep the others
    waiting. Needs RANK and WORLD_SIZE (`launch.setup_environment`).
    """
    whole = recipe.parallel.model_copy(update={"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "sequence": False})
    topology.initialize(whole, patience)
    [model] = build(recipe.model_copy(update={"parallel": whole, "recompute": "none"}), device.current())
    fill([model], recipe.model, lambda part: tensor(part.name), tensor_rank=0, tensor_size=1)
    return model.eval()


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    tokenizer: SentencePieceProcessor,
    prompt: str,
    *,
    num_tokens: int,
    sequence_length: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """`prompt` and up to `num_tokens` sampled tokens; stops at end of document.

    No BOS, as in training. Only the last `sequence_length` tokens are seen, and only tokens that have a text are drawn:
    a model's vocabulary may be larger than its tokenizer's.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt)
    for _ in range(num_tokens):
        window = torch.tensor([ids[-sequence_length:]], device=device.current())
        logits = model(window)[0, -1, : tokenizer.vocab_size()].float().cpu()
        token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
        if token == tokenizer.eos_id():
            break
        ids.append(token)
    return tokenizer.decode(ids)
