"""The memory that `plan` predicts, against what whole steps at true shapes allocate on a pretended GPU."""

from __future__ import annotations

import pytest

from megatron_patch.parallel import topology
from megatron_patch.plan import memory
from megatron_patch.recipe import load
from megatron_patch.train.step import Trainer
from tests.parallel.test_gpu_paths import empty_shard
from tests.pretend_gpu import become_gpu
from tests.ranks import run_ranks

BOUND = 0.01


def planned_and_allocated(name: str, world_size: int, rank: int, overrides: list[str]) -> tuple[int, int]:
    """On a rank: bytes at the peak of a step as planned, and as allocated in the second step."""
    with become_gpu(world_size, rank) as pretended:
        recipe = load(f"recipes/{name}.yaml", overrides)
        place = topology.initialize(recipe.parallel)
        planned = memory.Place(recipe, place.data_size, place.pipeline_rank)
        trainer = Trainer(recipe, place, planned.micro_batches)
        shard = empty_shard(recipe, planned.micro_batches)
        trainer.step(shard, 1e-4)
        pretended.peak = pretended.allocated
        trainer.step(shard, 1e-4)
        return memory.memory(planned).total, pretended.peak


def rows(micro_batch: int, micro_batches: int = 1) -> list[str]:
    return [f"batch.micro_batch_size={micro_batch}", f"batch.global_batch_size={micro_batch * micro_batches}"]


TP2, SP, PP2, PP4 = "parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.pipeline=4"
CASES = {
    "0.5B, 16 rows": ("mobillama_05b", 1, 0, rows(16)),
    "0.5B, 4 rows, selective recompute": ("mobillama_05b", 1, 0, [*rows(4), "recompute=selective"]),
    "0.5B, 4 rows, full recompute": ("mobillama_05b", 1, 0, [*rows(4), "recompute=full"]),
    "0.5B as published": ("mobillama_05b", 160, 7, []),
    "0.5B, TP2+SP": ("mobillama_05b", 2, 1, [*rows(4), TP2, SP]),
    "0.5B, PP2, first stage": ("mobillama_05b", 2, 0, [*rows(4, 3), PP2]),
    "0.5B, PP4, first stage, full recompute": ("mobillama_05b", 4, 0, [*rows(4, 6), PP4, "recompute=full"]),
    "0.5B, PP2, last stage": ("mobillama_05b", 2, 1, [*rows(4, 3), PP2]),
    "0.8B, 8 rows": ("mobillama_08b", 1, 0, rows(8)),
    "large-base, ZeRO-2": ("large_base", 8, 3, [*rows(8, 8), "parallel.zero_stage=2"]),
}


@pytest.mark.parametrize("case", CASES)
def test_planned_memory_is_what_a_step_allocates(case: str) -> None:
    ((planned, allocated),) = run_ranks(1, planned_and_allocated, *CASES[case])
    assert planned == pytest.approx(allocated, rel=BOUND), f"{planned / allocated - 1:+.1%}"
