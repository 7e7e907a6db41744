"""Load a trained model whole; continue a text with it, or answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import NamedTuple

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


class Answer(NamedTuple):
    """A model's answer to a prompt."""

    ids: list[int]
    """Without the end of turn."""
    ended: bool
    """Whether the model ended its turn by itself."""


@torch.no_grad()
def answer(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    end_of_turn: int,
    limit: int,
    sequence_length: int,
    vocab_size: int,
) -> list[Answer]:
    """Greedy answers of up to `limit` ids to all prompts at once, none beyond a row of `sequence_length`.

    Only ids below `vocab_size`, the tokenizer's, are given. Rows are padded on the right, which no token before sees.
    """
    said = [list(prompt) for prompt in prompts]
    ended = [False] * len(said)
    open_rows = [i for i, ids in enumerate(said) if len(ids) < sequence_length]
    for _ in range(limit):
        if not open_rows:
            break
        longest = max(len(said[i]) for i in open_rows)
        rows = torch.tensor([said[i] + [0] * (longest - len(said[i])) for i in open_rows], device=device.current())
        last = torch.tensor([len(said[i]) - 1 for i in open_rows], device=rows.device)
        logits = model(rows)[torch.arange(len(rows), device=rows.device), last, :vocab_size]
        for i, token in zip(open_rows, logits.float().argmax(-1).tolist(), strict=True):
            ended[i] = token == end_of_turn
            if not ended[i]:
                said[i].append(token)
        open_rows = [i for i in open_rows if not ended[i] and len(said[i]) < sequence_length]
    return [Answer(ids[len(p) :], end) for ids, p, end in zip(said, prompts, ended, strict=True)]


@torch.no_grad()
def stream(
    model: torch.nn.Module,
    prompt: Sequence[int],
    *,
    end_of_turn: int,
    limit: int,
    sequence_length: int,
    vocab_size: int,
    temperature: float,
    generator: torch.Generator,
) -> Iterator[int]:
    """The ids of one answer as they are drawn, up to the end of turn; greedy at temperature 0."""
    ids = list(prompt)
    for _ in range(min(limit, sequence_length - len(ids))):
        logits = model(torch.tensor([ids], device=device.current()))[0, -1, :vocab_size].float().cpu()
        if temperature:
            token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == end_of_turn:
            return
        ids.append(token)
        yield token
