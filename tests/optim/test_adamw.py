"""The real optimizer path, DeepSpeed and clipping included, against AdamW written out in float64 here.

AdamW is Loshchilov and Hutter's (arXiv 1711.05101, algorithm 2), its decay decoupled and scaled by the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from megatron_patch.model.parameters import whole_tensors
from megatron_patch.train.checkpoint.plan import local_ranges
from megatron_patch.train.step import Trainer
from tests.ranks import run_ranks
from tests.toy import toy_recipe, toy_shard, toy_trainer

STEPS, PEAK = 5, 1e-2
BETA1, BETA2, DECAY = 0.8, 0.95, 0.1
EPSILON = 1e-3  # of the size of the gradients' roots, so that it matters where it is added
SETTINGS = [
    f"optimizer.beta1={BETA1}",
    f"optimizer.beta2={BETA2}",
    f"optimizer.weight_decay={DECAY}",
    f"optimizer.epsilon={EPSILON}",
]

Piece = tuple[str, int, int, str, np.ndarray]  # tensor, tensor-parallel part, first element in it, what, values


def pieces(trainer: Trainer, what: str) -> Iterator[Piece]:
    """What this rank holds of gradients, master weights, weights or a moment."""
    optimizer, place = trainer.optimizer, trainer.topology
    for i, group in enumerate(optimizer.groups):
        if not group.replication.is_owner(place.pipeline_rank, place.tensor_rank):
            continue
        shard = {
            "gradient": lambda i=i: optimizer.buffers[i].shard,
            "master": lambda i=i: optimizer.master_shards[i],
            "weight": lambda i=i: optimizer.weight_shard(i),
        }.get(what, lambda i=i: optimizer.moments(i)[what])()
        for piece in local_ranges(optimizer, i, place.data_rank):
            part = 0 if piece.whole.cut is None else place.tensor_rank
            values = shard[piece.low : piece.high].double().numpy().copy()
            yield piece.whole.name, part, piece.start, what, values


def five_steps(overrides: list[str]) -> dict[str, Any]:
    trainer = toy_trainer(toy_recipe(*SETTINGS, *overrides))
    start, gradients = list(pieces(trainer, "master")), []
    for step in range(STEPS):
        trainer.compute(toy_shard(trainer, step))
        gradients.append(list(pieces(trainer, "gradient")))
        trainer.update(PEAK / (1 + step)).result()
        trainer.optimizer.gather()
    end = [p for what in ("master", "weight", "exp_avg", "exp_avg_sq") for p in pieces(trainer, what)]
    return {"start": start, "gradients": gradients, "end": end}


def joined(answers: list[list[Piece]]) -> dict[str, dict[tuple[str, int], np.ndarray]]:
    """Pieces of all ranks put together: what -> (tensor, part) -> flat values. Each element comes once."""
    found: dict[str, dict[tuple[str, int], list[tuple[int, np.ndarray]]]] = {}
    for name, part, start, what, values in (piece for answer in answers for piece in answer):
        found.setdefault(what, {}).setdefault((name, part), []).append((start, values))
    whole: dict[str, dict[tuple[str, int], np.ndarray]] = {}
    for what, tensors in found.items():
        for key, parts in tensors.items():
            parts.sort(key=lambda p: p[0])
            assert [start for start, _ in parts] == list(np.cumsum([0, *(len(v) for _, v in parts[:-1])])), key
            whole.setdefault(what, {})[key] = np.concatenate([values for _, values in parts])
    return whole


def decays(name: str, everything: bool) -> bool:
    return everything or not ("norm" in name or "embedding" in name)


CASES = {
    "fp32, all decay, clipped": (1, ["precision=fp32"], True, 0.05),
    "fp32, usual exemption, DP2": (2, ["precision=fp32"], False, 1e3),
    "bf16, usual exemption, clipped, TP2xPP2": (
        4,
        ["precision=bf16", "parallel.tensor=2", "parallel.pipeline=2"],
        False,
        0.05,
    ),
    "bf16, all decay, ZeRO-2 on DP2": (2, ["precision=bf16", "parallel.zero_stage=2"], True, 1e3),
}


@pytest.mark.parametrize("case", CASES)
def test_five_steps_are_adamw(case: str) -> None:
    ranks, layout, everything, clip = CASES[case]
    settings = [f"optimizer.decay_everything={str(everything).lower()}", f"optimizer.clip_grad_norm={clip}"]
    answers = run_ranks(ranks, five_steps, [*layout, *settings])
    weights = joined([a["start"] for a in answers])["master"]
    assert {name for name, _ in weights} == set(whole_tensors(toy_recipe().model))
    first = {key: np.zeros_like(w) for key, w in weights.items()}
    second = {key: np.zeros_like(w) for key, w in weights.items()}
    for step in range(STEPS):
        gradients = joined([a["gradients"][step] for a in answers])["gradient"]
        norm = np.sqrt(sum(float(np.square(g).sum()) for g in gradients.values()))
        assert (norm > clip) == (clip < 1), "the case does not show what it is for"
        rate = PEAK / (1 + step)
        for key, gradient in gradients.items():
            gradient = gradient * min(1.0, clip / (norm + 1e-6))
            first[key] = BETA1 * first[key] + (1 - BETA1) * gradient
            second[key] = BETA2 * second[key] + (1 - BETA2) * gradient**2
            if decays(key[0], everything):
                weights[key] = weights[key] - rate * DECAY * weights[key]
            corrected = first[key] / (1 - BETA1 ** (step + 1))
            root = np.sqrt(second[key] / (1 - BETA2 ** (step + 1)))
            weights[key] = weights[key] - rate * corrected / (root + EPSILON)
    end = joined([a["end"] for a in answers])
    for key, expected in weights.items():
        assert np.abs(end["master"][key] - expected).max() < 2e-6, key
        assert np.abs(end["exp_avg"][key] - first[key]).max() < 2e-6 * np.abs(first[key]).max(), key
        assert np.abs(end["exp_avg_sq"][key] - second[key]).max() < 2e-6 * np.abs(second[key]).max(), key
        rounded = torch.from_numpy(end["master"][key]).float()
        if "precision=bf16" in layout:
            rounded = rounded.bfloat16()
        assert np.array_equal(end["weight"][key], rounded.double().numpy()), key
