"""A toy model trained on seeded random rows, under any layout: what the tests of layouts and gradients share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_patch.data.loader import BatchShard
from megatron_patch.data.marks import Marks
from megatron_patch.data.sharding import micro_batches, shard_of
from megatron_patch.model.parameters import local_parameters, whole_tensors
from megatron_patch.parallel import topology
from megatron_patch.recipe import Recipe, load
from megatron_patch.train.schedule import learning_rate
from megatron_patch.train.step import Trainer

TOY = [
    "precision=fp32",
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.num_attention_heads=4",
    "model.vocab_size=64",
    "model.sequence_length=16",
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "batch.global_batch_size=8",
    "batch.micro_batch_size=1",
    "optimizer.learning_rate=3e-4",
    "optimizer.min_learning_rate=3e-5",
    "optimizer.warmup_steps=3",
]


def toy_recipe(*overrides: str) -> Recipe:
    return load("recipes/demo.yaml", [*TOY, *overrides])


# A model that sees, of which an image is 4 tokens.
SEEING = [
    "model.vision={image_size: 8, patch_size: 4, fit: pad, hidden_size: 24, ffn_hidden_size: 40, num_layers: 2,"
    " num_attention_heads: 2, norm_epsilon: 1e-5, activation: quick_gelu, pixel_shuffle: 1, placeholder_id: 1}",
]


def random_rows(recipe: Recipe, step: int) -> np.ndarray:
    """The rows of a step's global batch: uint16 [global batch size, row length].

    Of a model that sees, rows have no image, one and two in turn.
    """
    shape = (recipe.batch.global_batch_size, recipe.row_length)
    rows = np.random.RandomState(1000 + step).randint(0, recipe.model.vocab_size, shape).astype(np.uint16)
    if (vision := recipe.model.vision) is not None:
        rows[rows == vision.placeholder_id] = 0
        rows[1::3, 5 : 5 + vision.tokens] = vision.placeholder_id
        rows[2::3, 1 : 1 + vision.tokens] = rows[2::3, 10 : 10 + vision.tokens] = vision.placeholder_id
    return rows


def random_images(recipe: Recipe, step: int) -> list[np.ndarray]:
    """Of each row of a step's global batch its images: uint8 [n, 3, size, size]."""
    random, vision = np.random.RandomState(3000 + step), recipe.model.vision
    assert vision is not None
    images = [(row == vision.placeholder_id).sum() // vision.tokens for row in random_rows(recipe, step)]
    size = vision.image_size
    return [random.randint(0, 256, (count, 3, size, size)).astype(np.uint8) for count in images]


def random_marks(recipe: Recipe, step: int) -> Marks:
    """Of the rows of a step's global batch: conversations of 1 to 9 ids, of which none, some or all count.

    Rows differ in how many of their labels count, the first by one alone, and no conversation's first id does.
    """
    random = np.random.RandomState(2000 + step)
    shape = (recipe.batch.global_batch_size, recipe.row_length)
    starts = random.rand(*shape) < 0.25
    starts[:, 0] = True
    counted = (random.rand(*shape) < np.linspace(0.05, 0.9, len(starts))[:, None]) & ~starts
    counted[0] = np.arange(recipe.row_length) == 9
    starts[0, 9] = False
    return Marks(counted, starts)


def toy_trainer(recipe: Recipe) -> Trainer:
    """On a rank with a process group: groups, model and optimizer of the recipe's layout."""
    place = topology.initialize(recipe.parallel)
    return Trainer(recipe, place, micro_batches(recipe, place.data_size))


def toy_shard(trainer: Trainer, step: int) -> BatchShard:
    """This rank's shard of `random_rows(recipe, step)`, sharded as the loader does.

    With `random_marks` where the recipe resets attention at starts.
    """
    recipe, place = trainer.recipe, trainer.topology
    batch = random_rows(recipe, step)
    micro = recipe.batch.micro_batch_size
    labels = len(batch) * recipe.model.sequence_length
    rows, weights = shard_of(np.arange(len(batch)), place.data_rank, place.data_size, micro, trainer.micro_batches)
    marks = None
    if recipe.data.reset_at_starts:
        whole = random_marks(recipe, step)
        labels = int(whole.counted[:, 1:].sum())
        marks = whole.of(rows[rows >= 0]).placed(rows >= 0)
    tokens = np.where(weights[..., None] > 0, batch[rows], 0)
    pixels = None
    if recipe.model.vision is not None and place.pipeline_rank == 0:
        images = random_images(recipe, step)
        pixels = [np.concatenate([images[0][:0], *(images[row] for row in part if row >= 0)]) for part in rows]
    return BatchShard(0, step * len(batch), rows, tokens, weights, labels, marks, pixels)


def train_toy(overrides: list[str], steps: int) -> dict[str, Any]:
    """On a rank: train `steps` steps; the results of each step and this rank's final parts of the weights by name."""
    recipe = toy_recipe(*overrides)
    trainer = toy_trainer(recipe)
    results = []
    replicas_equal = True
    for step in range(steps):
        results.append(trainer.step(toy_shard(trainer, step), learning_rate(step, recipe.optimizer, steps)))
        replicas_equal &= _replicas_equal(trainer)
    parts = {whole.name: p.detach().cpu().clone() for whole, p in local_parameters(trainer.chunks, recipe.model)}
    return {
        "losses": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
        "tensor_rank": trainer.topology.tensor_rank,
        "replicas_equal": replicas_equal,
        "parts": parts,
    }


def _replicas_equal(trainer: Trainer) -> bool:
    """Whether every parameter is the same bits on all ranks that hold the same part of it."""
    place = trainer.topology
    mine = {
        (whole.name, place.tensor_rank if whole.cut is not None else 0): p.detach()
        .cpu()
        .view(torch.uint8)
        .numpy()
        .tobytes()
        for whole, p in local_parameters(trainer.chunks, trainer.recipe.model)
    }
    everyone: list[dict[tuple[str, int], bytes]] = [{} for _ in range(place.world_size)]
    torch.distributed.all_gather_object(everyone, mine)
    first: dict[tuple[str, int], bytes] = {}
    return all(first.setdefault(part, content) == content for held in everyone for part, content in held.items())


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().view(torch.uint8).numpy().tobytes()


def gather(answers: list[dict[str, Any]], recipe: Recipe) -> dict[str, torch.Tensor]:
    """Whole-model weights from the parts that `train_toy` returned on every rank."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for answer in answers:
        for name, part in answer["parts"].items():
            parts.setdefault(name, {})[answer["tensor_rank"]] = part
    wholes = whole_tensors(recipe.model)
    assert parts.keys() == wholes.keys()
    gathered = {}
    for name, by_rank in parts.items():
        whole = wholes[name]
        pieces = [by_rank[r].view(whole.part_shape(len(by_rank))) for r in sorted(by_rank)]
        gathered[name] = pieces[0] if whole.cut is None else torch.cat(pieces, whole.cut)
    return gathered
