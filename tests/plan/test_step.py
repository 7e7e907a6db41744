"""The clock that `plan` predicts: against steps measured on an H100, and against what no step can undercut."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_patch.parallel.gpus import GPUS
from megatron_patch.plan.hardware import Hardware
from megatron_patch.plan.plan import Plan
from megatron_patch.plan.step import Ranks
from megatron_patch.recipe import load

MEASURED = Path("benchmarks/gpu_h100_2026-11-26.md")
ROW = re.compile(r"^\| (mobillama_05b|mobillama_08b|large_base)(, run.deterministic=false)? \| (\d+) \| ([\d,]+) \|")
ROWS = [found.groups() for line in MEASURED.read_text().splitlines() if (found := ROW.match(line))]


def plan_of(name: str, gpus: str, nodes: int, *overrides: str, per_node: int = 8) -> Plan:
    on = Hardware(nodes, gpus, GPUS[gpus].with_ranks(per_node))
    return Plan.of(load(f"recipes/{name}.yaml", list(overrides)), on)


@pytest.mark.parametrize(("name", "free", "micro_batch", "tokens_per_second"), ROWS)
def test_steps_measured_on_an_h100(name: str, free: str | None, micro_batch: str, tokens_per_second: str) -> None:
    """One GPU, 32 rows a step, as benchmarks/gpu.py runs them."""
    overrides = [f"batch.micro_batch_size={micro_batch}", "batch.global_batch_size=32"]
    overrides += ["run.deterministic=false"] if free else []
    plan = plan_of(name, "h100", 1, *overrides, per_node=1)
    assert len(ROWS) == 11
    assert plan.tokens_per_second == pytest.approx(int(tokens_per_second.replace(",", "")), rel=0.01)
    assert not plan.step.waits


LAYOUTS = [
    "",
    "parallel.zero_stage=2 recompute=full",
    "parallel.reduce_bucket=0",
    "parallel.tensor=2 parallel.sequence=true",
    "parallel.tensor=8 run.deterministic=false",
    "parallel.pipeline=2 batch.micro_batch_size=1",
    "parallel.pipeline=4 parallel.virtual_pipeline=2 batch.micro_batch_size=1",
    "parallel.tensor=2 parallel.pipeline=2 batch.micro_batch_size=2",
]


@pytest.mark.parametrize("gpus", ["a100-80g-2-ports", "a100-80g", "h100"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_step_is_shorter_than_what_it_waits_for_or_sends(layout: str, gpus: str) -> None:
    for name in ("mobillama_05b", "baseline2"):
        plan = plan_of(name, gpus, 20, *layout.split())
        step = plan.step
        assert step.seconds == pytest.approx(step.rows + step.padding + step.update + sum(step.waits.values()))
        assert min(step.rows, step.padding, step.update, step.hidden, *step.waits.values()) >= -1e-9
        assert step.seconds > sum(seconds for _, seconds in plan.traffic())
        assert plan.mfu < plan.gpu.matmul_flops / plan.gpu.peak_flops


def test_traffic_is_hidden_only_as_long_as_something_computes() -> None:
    """On a network a hundred times slower a step takes as long as its traffic; on a DGX's, about as its work."""
    usual = plan_of("mobillama_05b", "a100-80g", 20)
    slow = Plan.of(usual.settings, Hardware(20, "a100-80g", usual.gpu.with_ports(8, 2)))
    data = sum(seconds for item, seconds in slow.traffic() if item.group == "data")
    assert slow.step.rows == usual.step.rows
    assert data < slow.step.seconds < data + slow.step.rows
    assert slow.step.hidden < slow.step.rows
    assert slow.step.bound_by == "gradients"
    assert usual.step.seconds == pytest.approx(usual.step.rows, rel=0.05)
    assert usual.step.bound_by == "computation"


def test_padding_and_bubble_are_part_of_the_step() -> None:
    whole, padded = (plan_of("mobillama_05b", "a100-80g", nodes) for nodes in (20, 19))
    # 800 rows on 152 ranks: 10 are computed where 5.26 are a rank's share.
    assert padded.step.rows + padded.step.padding == pytest.approx(2 * whole.step.rows)
    assert padded.step.bound_by == "padding"
    piped = plan_of("mobillama_05b", "a100-80g", 20, "parallel.pipeline=2", "batch.micro_batch_size=1")
    # 10 micro-batches on two stages: 11 are waited for.
    assert piped.step.waits["bubble"] >= piped.step.rows / 10


def test_a_smaller_mfu_of_the_computation_leaves_the_waits_alone() -> None:
    usual = plan_of("mobillama_05b", "a100-80g", 20)
    slow = Plan.of(usual.settings, Hardware(20, "a100-80g", usual.gpu, mfu=0.1))
    computed = slow.step.rows + slow.step.update
    assert 800 * 2048 * 7.728e9 / 160 / computed / 312e12 == pytest.approx(0.1, rel=0.01)
    assert slow.step.waits["gradients"] == pytest.approx(usual.step.waits["gradients"], rel=0.3)


def test_the_layout_decides_whose_network_a_group_has() -> None:
    """Eight tensor ranks a node: eight data groups of one GPU a node each, which share its ports."""
    gpu = GPUS["a100-80g-2-ports"]
    places = [plan_of("mobillama_05b", "a100-80g-2-ports", 20, f"parallel.tensor={n}").places[0] for n in (1, 8)]
    alone, shared = (Ranks(place, gpu).seconds("data", "reduce-scatter", 1e9) for place in places)
    assert shared == pytest.approx(8 * alone * (19 / 20) / (159 / 160), rel=0.05)
