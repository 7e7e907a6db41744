"""What only a machine with a GPU would run, without one: whole steps on tensors of a pretended CUDA device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu
from megatron_patch.data.loader import BatchShard
from megatron_patch.kernels import choice
from megatron_patch.launch import LaunchError
from megatron_patch.parallel import device, topology
from megatron_patch.recipe import Recipe, load
from megatron_patch.train.step import Trainer
from tests.pretend_gpu import GPU, HostWaits, become_gpu
from tests.ranks import run_ranks
from tests.toy import TOY

GPU_TOY = [*TOY, "precision=bf16", "kernels=auto", "batch.micro_batch_size=2"]
MICRO_BATCHES = 2
KERNELS = {"_forward", "_backward", "_turn", "_row_statistics", "_to_logits_gradient"}


def empty_shard(recipe: Recipe, micro_batches: int) -> BatchShard:
    shape = (micro_batches, recipe.batch.micro_batch_size)
    tokens = np.zeros((*shape, recipe.row_length), np.uint16)
    return BatchShard(0, 0, np.zeros(shape, int), tokens, np.ones(shape, np.float32), tokens[..., 1:].size)


def steps(overrides: list[str], world_size: int, rank: int) -> set[str]:
    """On a rank: three steps, of which the host waits for none but the first; the Triton kernels that were launched."""
    with become_gpu(world_size, rank) as pretended:
        recipe = load("recipes/demo.yaml", overrides)
        trainer = Trainer(recipe, topology.initialize(recipe.parallel), MICRO_BATCHES)
        shard = empty_shard(recipe, MICRO_BATCHES)
        trainer.step(shard, 1e-4)  # tables and moments are made, once
        pretended.launches.clear()
        with pretended.no_waits():
            for _ in range(2):
                trainer.compute(shard)
                step = trainer.update(1e-4)
            assert step.result().applied
        trainer.optimizer.gather()
        trainer.held_out_loss([shard], labels=64)
        return set(pretended.launches)


LAYOUTS = {
    "one GPU": (1, 0, []),
    "DP2, selective recompute, ZeRO-2": (2, 1, ["recompute=selective", "parallel.zero_stage=2"]),
    "TP2+SP, full recompute": (4, 1, ["parallel.tensor=2", "parallel.sequence=true", "recompute=full"]),
    "TP2": (2, 0, ["parallel.tensor=2", "model.num_ffns=null"]),
    "PP2, first stage": (4, 0, ["parallel.pipeline=2"]),
    "PP2, last stage": (4, 3, ["parallel.pipeline=2"]),
    "PP2xVPP2": (2, 1, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_stays_on_the_gpu_and_the_host_ahead_of_it(layout: str) -> None:
    world_size, rank, overrides = LAYOUTS[layout]
    (launched,) = run_ranks(1, steps, [*GPU_TOY, *overrides], world_size, rank)
    assert launched == (KERNELS if layout != "PP2, first stage" else {"_forward", "_backward", "_turn"})


def test_a_step_by_reference_kernels() -> None:
    assert run_ranks(1, steps, [*GPU_TOY, "kernels=reference"], 1, 0) == [set()]


def refused() -> list[str]:
    """What the pretended device says of four mistakes."""
    on_host, on_gpu, answers = torch.zeros(2), None, []
    with become_gpu() as pretended:
        on_host, on_gpu = torch.zeros(2), torch.zeros(2, device="cuda")
        pinned = torch.zeros(2).pin_memory()
        with pretended.no_waits():
            pinned.to(GPU, non_blocking=True)
            for mistake in (
                lambda: on_host + on_gpu,
                lambda: on_gpu[0].item(),
                lambda: on_host.to(GPU, non_blocking=True),
                lambda: pinned.copy_(on_gpu),
            ):
                with pytest.raises((HostWaits, RuntimeError)) as error:
                    mistake()
                answers.append(str(error.value).partition(",")[0])
    return answers


def test_the_pretended_gpu_refuses_what_a_real_one_refuses_or_waits_for() -> None:
    copy = "a copy between host and device that the host waits for"
    ((mixed, *waits),) = run_ranks(1, refused)
    assert mixed in (  # of torch 2.13 and 2.11
        "Expected all tensors to be on the same device",
        "Unhandled FakeTensor Device Propagation for aten.add.Tensor",
    )
    assert waits == ["item of a tensor on the GPU", copy, copy]


def called_once(function: Callable[[], Any], **_: int) -> float:
    function()
    return 1.0


def benchmark(folder: Path) -> tuple[dict[str, Any], str]:
    """`make bench-gpu` at its toy size, with one of its models, every case called once."""
    gpu.MODELS = gpu.MODELS[:1]
    gpu.SMALL.remove("kernels=reference")
    gpu.measure.seconds_a_call = gpu.kernels.seconds_a_call = called_once
    with become_gpu():
        run = gpu.Benchmark(folder, minutes=5, small=True)
        run.run()
    return run.results, gpu.table(run.results)


def test_the_gpu_benchmark_runs_to_its_end(tmp_path: Path) -> None:
    ((results, table),) = run_ranks(1, benchmark, tmp_path)
    assert results["notes"] == []
    assert [case["name"] for case in results["cases"]] == [
        *("mobillama_05b", "mobillama_05b", "mobillama_05b, run.deterministic=false"),
        *("HF Llama, SDPA, eager", "mcore local spec", "HF Llama, SDPA, torch.compile"),
    ]
    assert set(results["chosen_kernels"].values()) == {"triton"}
    assert results["weight_gradients_by"] == "torch.addmm"
    assert "CUDNN_ATTENTION" in table


@pytest.mark.parametrize(
    ("visible", "local_rank", "torchrun", "bound"),
    [(8, 5, True, 5), (1, 0, True, 0), (1, 5, False, 0), (1, 1, True, None), (4, 5, False, None)],
)
def test_a_rank_takes_the_gpu_it_sees(
    visible: int, local_rank: int, torchrun: bool, bound: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    taken: list[int] = []
    monkeypatch.setattr(device, "HAS_GPU", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: taken[0])
    if bound is None:
        with pytest.raises(LaunchError, match=rf"rank {local_rank} of its node, .* sees {visible} GPUs?;"):
            device.use(local_rank)
    else:
        assert device.use(local_rank) == torch.device("cuda", bound)


def test_without_a_compiler_kernels_run_as_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose_weight_gradient", lambda _: "")
    monkeypatch.setattr("megatron_patch.kernels.check.difference", lambda *_: "RuntimeError: no C compiler")
    with pytest.warns(UserWarning, match="kernel norm runs as reference, which is slower: triton: .*; compiled: Run"):
        assert set(choice.choose("auto", torch.device("cuda")).values()) == {"reference"}
