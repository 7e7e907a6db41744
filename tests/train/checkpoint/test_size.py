"""What a checkpoint weighs: one copy of everything, and next to nothing beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_patch.model.build import build
from megatron_patch.model.parameters import Whole, local_parameters, whole_tensors
from megatron_patch.optim.groups import parameter_groups
from megatron_patch.parallel import topology
from megatron_patch.parallel.topology import Topology
from megatron_patch.recipe import Recipe, load
from megatron_patch.train.checkpoint import open_checkpoint
from megatron_patch.train.checkpoint.format import Fragment, What, stored_whats
from megatron_patch.train.checkpoint.plan import fragment, shard_ranges
from tests.ranks import run_ranks
from tests.toy import toy_shard, toy_trainer

UNIQUE_05B = 534_865_920
BYTES = {"weight": 2, "master": 4, "exp_avg": 4, "exp_avg_sq": 4}


def save_plan(recipe: Recipe, parameters: list[tuple[Whole, torch.nn.Parameter]], place: Topology) -> list[Fragment]:
    """What a rank writes, DeepSpeed's flat groups being its parameters one after the other, padded to 2 x DP."""
    plan = []
    for group in parameter_groups(parameters, recipe, place.pipeline_rank):
        if group.replication.is_owner(place.pipeline_rank, place.tensor_rank):
            lengths = [p.numel() for p in group.parameters]
            offsets = [sum(lengths[:i]) for i in range(len(lengths))]
            padded = -(-sum(lengths) // (2 * place.data_size)) * 2 * place.data_size
            pieces = shard_ranges(group.wholes, offsets, lengths, place.data_rank, padded // place.data_size)
            plan += [fragment(piece, place.tensor_rank, place.tensor_size) for piece in pieces]
    return plan


def file_bytes(plan: list[Fragment]) -> int:
    """Of a safetensors file: its JSON header, rounded up to 8, and the data."""
    header, end = {}, 0
    whats: tuple[What, ...] = stored_whats("full", "bf16")
    for piece in plan:
        for what in whats:
            start, end = end, end + piece.length * BYTES[what]
            dtype = "BF16" if what == "weight" else "F32"
            header[piece.key(what)] = {"dtype": dtype, "shape": [piece.length], "data_offsets": [start, end]}
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + end


def check_plan(plans: list[list[Fragment]]) -> None:
    pieces = [piece for plan in plans for piece in plan]
    assert sum(piece.length for piece in pieces) == UNIQUE_05B, "not one copy of everything"
    assert len({(p.name, p.part, p.offset) for p in pieces}) == len(pieces)
    index = len(json.dumps([[p.name, p.part, p.parts, p.offset, p.length] for p in pieces])) * 3
    total = sum(file_bytes(plan) for plan in plans if plan) + index
    print(f"{total:,} bytes, {total / (UNIQUE_05B * 14):.4f} of {UNIQUE_05B:,} x 14")
    assert UNIQUE_05B * 14 < total <= UNIQUE_05B * 14 * 1.02


def test_the_plan_of_160_data_parallel_ranks() -> None:
    recipe = load("recipes/mobillama_05b.yaml")
    parameters = [
        (whole, torch.nn.Parameter(torch.empty(whole.shape, dtype=torch.bfloat16, device="meta")))
        for whole in whole_tensors(recipe.model).values()
    ]
    check_plan([save_plan(recipe, parameters, Topology(r, 160, 0, 1, 0, 1, 1, r, 160)) for r in range(160)])


def meta_plan(recipe: Recipe) -> list[Fragment]:
    """On a rank: the plan of its part of the model, on the meta device."""
    place = topology.initialize(recipe.parallel)
    return save_plan(recipe, list(local_parameters(build(recipe, torch.device("meta")), recipe.model)), place)


def test_the_plan_under_tensor_and_pipeline_parallelism() -> None:
    recipe = load("recipes/mobillama_05b.yaml", ["parallel.tensor=2", "parallel.pipeline=2"])
    check_plan(run_ranks(8, meta_plan, recipe))


def saved_bytes(recipe: Recipe) -> int:
    """On a rank: bytes on disk of a checkpoint after one step."""
    from megatron_patch.train.checkpoint.format import State
    from megatron_patch.train.checkpoint.save import Saver

    trainer = toy_trainer(recipe)
    trainer.step(toy_shard(trainer, 0), 1e-4)
    saver = Saver(recipe, trainer.topology, trainer.optimizer)
    folder = recipe.run_folder / "checkpoint"
    state = State(step=1, samples=1, tokens=1, optimizer_step=1, data_digest=None)
    saver.save(folder, state, "full", lambda saved: None)
    saver.wait()
    open_checkpoint(folder).close()
    return sum(p.stat().st_size for p in folder.iterdir())


def test_the_bytes_are_those_of_the_plan(tmp_path: Path) -> None:
    """At a width where headers weigh little: 1.9 million parameters."""
    shape = ["model.hidden_size=256", "model.ffn_hidden_size=704", "model.num_layers=4", "model.vocab_size=512"]
    recipe = load(
        "recipes/demo.yaml",
        [*shape, "precision=bf16", "batch.global_batch_size=4", "batch.micro_batch_size=2", f"run.folder={tmp_path}"],
    )
    unique = sum(torch.Size(w.shape).numel() for w in whole_tensors(recipe.model).values())
    size = run_ranks(4, saved_bytes, recipe)[0]
    print(f"{size:,} bytes, {size / (unique * 14):.4f} of {unique:,} x 14")
    assert unique * 14 < size <= unique * 14 * 1.02


@pytest.mark.soak
def test_the_bytes_of_the_05b(tmp_path: Path) -> None:
    """Needs 20 GB of memory and 8 GB of disk."""
    small = ["model.sequence_length=16", "batch.global_batch_size=1", "batch.micro_batch_size=1"]
    recipe = load("recipes/mobillama_05b.yaml", [*small, f"run.folder={tmp_path}"])
    size = run_ranks(1, saved_bytes, recipe, timeout=1200)[0]
    print(f"{size:,} bytes, {size / (UNIQUE_05B * 14):.4f} of {UNIQUE_05B:,} x 14")
    assert UNIQUE_05B * 14 < size <= UNIQUE_05B * 14 * 1.02
