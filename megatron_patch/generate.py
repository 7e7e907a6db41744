"""Load a trained model whole; continue a text with it, or answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor

from megatron_patch.model.attention import Seen
from megatron_patch.model.build import build
from megatron_patch.model.initialise import fill
from megatron_patch.parallel import device, topology
from megatron_patch.recipe import Recipe
from megatron_patch.vision.images import Pictures


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


class Answer(NamedTuple):
    """A model's answer to a prompt."""

    ids: list[int]
    """Without the end of turn."""
    ended: bool
    """Whether the model ended its turn by itself."""


def answer(
    model: torch.nn.Module,
    prompt: Sequence[int],
    *,
    end_of_turn: int,
    limit: int,
    sequence_length: int,
    vocab_size: int,
    pictures: Pictures | None = None,
) -> Answer:
    """The greedy answer of up to `limit` ids to a prompt, within a row of `sequence_length`; see `stream`."""
    ids = list(
        stream(
            model,
            prompt,
            end_of_turn=end_of_turn,
            limit=limit,
            sequence_length=sequence_length,
            vocab_size=vocab_size,
            pictures=pictures,
        )
    )
    return Answer(ids, ended=len(ids) < min(limit, sequence_length - len(prompt)))


def pictures_of(prompt: Sequence[int], pixels: np.ndarray, placeholder_id: int) -> Pictures:
    """A prompt's images, uint8 [n, 3, size, size], at its placeholders."""
    places = np.flatnonzero(np.array(prompt) == placeholder_id)
    return Pictures(device.upload(torch.from_numpy(pixels)), device.upload(torch.from_numpy(places)))


@torch.no_grad()
def stream(
    model: torch.nn.Module,
    prompt: Sequence[int],
    *,
    end_of_turn: int,
    limit: int,
    sequence_length: int,
    vocab_size: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    pictures: Pictures | None = None,
) -> Iterator[int]:
    """The ids of one answer as they are drawn, up to the end of turn; greedy at temperature 0.

    Only ids below `vocab_size`, the tokenizer's, are given. Each token is computed once; keys and values of all before
    it are kept. `pictures` are the prompt's.
    """
    seen, following = Seen(sequence_length), list(prompt)
    for _ in range(min(limit, sequence_length - len(prompt))):
        rows = torch.tensor([following], device=device.current())
        logits = model(rows, seen=seen, pictures=pictures)[0, -1, :vocab_size].float().cpu()
        if temperature:
            token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == end_of_turn:
            return
        following, pictures = [token], None
        yield token
