"""What `plan` says of memory and bytes on the wire, against real ranks: allocations, saved tensors, collectives."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_patch.parallel import device
from megatron_patch.plan import memory, network
from tests import toy
from tests.ranks import run_ranks

os.environ["TORCH_FR_BUFFER_SIZE"] = "20000"  # the flight recorder keeps every collective of a toy step

TP2_SP = ["parallel.tensor=2", "parallel.sequence=true"]
ALIGN = [*toy.SEEING, "optimizer.frozen=[encoder,decoder]"]
PP2xVPP2 = ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]
LAYOUTS = {
    "DP2": (2, []),
    "DP3": (3, ["batch.micro_batch_size=2"]),
    "DP2 ZeRO-2": (2, ["parallel.zero_stage=2", "optimizer.decay_everything=false"]),
    "TP2": (2, ["parallel.tensor=2", "model.num_ffns=null"]),
    "TP2+SP": (2, TP2_SP),
    "TP2+SP x DP2": (4, TP2_SP),
    "PP2": (2, ["parallel.pipeline=2"]),
    "PP2 x DP2": (4, ["parallel.pipeline=2"]),
    "PP2xVPP2": (2, PP2xVPP2),
    "PP4, 22 layers": (4, ["parallel.pipeline=4", "model.num_layers=22"]),
    "selective, TP2": (2, ["parallel.tensor=2", "recompute=selective"]),
    "full, TP2": (2, ["parallel.tensor=2", "recompute=full"]),
    "full, TP2+SP": (2, ["parallel.tensor=2", "parallel.sequence=true", "recompute=full"]),
    "bf16, DP2": (2, ["precision=bf16"]),
    "seeing, TP2+SP x PP2 x DP2": (8, [*toy.SEEING, *TP2_SP, "parallel.pipeline=2"]),
    "seeing, encoder frozen, DP2": (2, [*toy.SEEING, "optimizer.frozen=[encoder]"]),
    "projector alone, PP2 x DP2": (4, [*ALIGN, "parallel.pipeline=2", "precision=bf16"]),
    "projector alone, TP2+SP": (2, [*ALIGN, *TP2_SP]),
    # Of six layers on three stages the first FFN's end inside the second; of four by turns all stages hold all FFNs.
    "two FFNs in blocks, PP3 x DP2": (6, ["parallel.pipeline=3", "model.num_layers=6", "model.num_ffns=2"]),
    "two FFNs by turns, TP2+SP x PP2": (
        4,
        [*TP2_SP, "parallel.pipeline=2", "model.num_ffns=2", "model.ffn_pattern=cycle"],
    ),
    "three FFNs in blocks, PP2xVPP2": (2, [*PP2xVPP2, "model.num_ffns=3"]),
}
# gloo has no reduce-scatter of its own and records the all-reduce that it runs instead.
OPERATIONS = {"all_reduce": "reduced", "all_gather": "gathered", "all-reduce": "reduced"}
OPERATIONS |= {"reduce-scatter": "reduced", "all-gather": "gathered", "send": "sent"}
WIDTHS = {"Float": 4, "BFloat16": 2}


def numel(sizes: list[list[int]]) -> int:
    return sum(torch.Size(size).numel() for size in sizes)


def measure(overrides: list[str]) -> dict[str, Any]:
    """On a rank: what one step allocates for good and exchanges."""
    trainer = toy.toy_trainer(toy.toy_recipe(*overrides))
    shard = toy.toy_shard(trainer, 0)
    trainer.step(shard, 1e-4)  # the optimizer makes its moments in the first step
    exchanged: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    send = dist.ProcessGroup.send

    def counted_send(group: dist.ProcessGroup, tensors: list[torch.Tensor], *args: Any) -> dist.Work:
        exchanged["pipeline", "sent"] += sum(t.nbytes for t in tensors)  # the flight recorder leaves gloo's sends out
        calls["pipeline", "sent"] += len(tensors)
        return send(group, tensors, *args)

    before = len(json.loads(device.flight_record())["entries"])
    with mock.patch.object(dist.ProcessGroup, "send", counted_send):
        trainer.step(shard, 1e-4)
    for entry in json.loads(device.flight_record())["entries"][before:]:
        group = entry["process_group"][1].split("_")[0].lower()
        operation = OPERATIONS[entry["profiling_name"].removeprefix("gloo:")]
        whole = max(numel(entry["input_sizes"]), numel(entry["output_sizes"]))
        exchanged[group, operation] += whole * WIDTHS[entry["input_dtypes"][0]]
        calls[group, operation] += 1
    zero = trainer.optimizer
    moments = [m for i in range(len(zero.groups)) for what, m in zero.moments(i).items() if what.startswith("exp_avg")]
    return {
        "stage": trainer.topology.pipeline_rank,
        "data_size": trainer.topology.data_size,
        "weights": sum(flat.nbytes for flat in zero.flat_weights),
        "gradients": sum(b._bytes + (b.shard.nbytes if b.shard is not b.flat else 0) for b in zero.buffers),
        "optimizer": sum(t.nbytes for t in [*zero.master_shards, *moments]),
        "exchanged": exchanged,
        "calls": calls,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_and_traffic_of_real_ranks(layout: str) -> None:
    world_size, overrides = LAYOUTS[layout]
    recipe = toy.toy_recipe(*overrides)
    for real in run_ranks(world_size, measure, overrides):
        place = memory.Place(recipe, real["data_size"], real["stage"])
        planned = memory.memory(place)
        assert planned.weights == real["weights"]
        assert planned.gradients == real["gradients"]
        assert planned.optimizer == real["optimizer"]
        traffic = Counter({("default", "reduced"): 16})  # loss, norm, requests and joules, over the world
        calls = Counter({("default", "reduced"): 1})
        for item in network.traffic(place):
            traffic[item.group, OPERATIONS[item.operation]] += item.payload
            calls[item.group, OPERATIONS[item.operation]] += item.calls
        assert traffic == real["exchanged"]
        assert calls == real["calls"]


SAVED = [
    "kernels=triton",
    "model.num_layers=2",
    "batch.micro_batch_size=2",
    "batch.global_batch_size=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.vocab_size=128",
    "model.sequence_length=16",
]


def saved_bytes(overrides: list[str]) -> tuple[int, int]:
    """On a rank: its pipeline stage, and the bytes that autograd holds when one micro-batch has run forward."""
    trainer = toy.toy_trainer(toy.toy_recipe(*overrides))
    parameters = {p.untyped_storage().data_ptr() for chunk in trainer.chunks for p in chunk.parameters()}
    kept: dict[int, torch.Tensor] = {}  # by storage; the tensors stay alive, so no address comes twice
    backward = torch.autograd.graph._engine_run_backward
    in_backward = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and not in_backward:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    def marked(*args: Any, **kwargs: Any) -> Any:
        in_backward.append(True)  # what is kept from here on is recomputed
        return backward(*args, **kwargs)

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        mock.patch("torch.autograd.graph._engine_run_backward", marked),
        mock.patch("torch.autograd._engine_run_backward", marked),
    ):
        trainer.step(toy.toy_shard(trainer, 0), 1e-4)
    m = trainer.recipe.model
    table = 2 * m.sequence_length * m.head_dim // 2 * 4  # rotary angles: once a model, not once a layer
    sizes = [t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters]
    return trainer.topology.pipeline_rank, sum(sizes) - table


@pytest.mark.parametrize(
    "layout",
    [
        "",
        "parallel.tensor=2",
        "parallel.tensor=2 parallel.sequence=true",
        "parallel.pipeline=2",
        "recompute=selective",
        "recompute=full",
        "recompute=full parallel.tensor=2 parallel.sequence=true",
    ],
)
def test_activations_are_what_autograd_keeps(layout: str) -> None:
    overrides = [*SAVED, *layout.split()]
    recipe = toy.toy_recipe(*overrides)
    p = recipe.parallel
    for stage, real in run_ranks(p.tensor * p.pipeline, saved_bytes, overrides):
        place = memory.Place(recipe, 1, stage)
        planned = memory.memory(place).activations
        assert planned == real
