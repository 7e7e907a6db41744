"""Bit equality of checkpoints, and of what their runs logged."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megatron_patch.train.checkpoint import Checkpoint, open_checkpoint
from megatron_patch.train.checkpoint.format import What


def newest(run: Path) -> Checkpoint:
    """The restart checkpoint that `latest` names, verified."""
    checkpoints = run / "checkpoints"
    return open_checkpoint(checkpoints / (checkpoints / "latest").read_text().strip())


def assert_bit_equal(one: Checkpoint, other: Checkpoint) -> None:
    assert (one.step, one.samples, one.state.optimizer_step) == (other.step, other.samples, other.state.optimizer_step)
    whats: tuple[What, ...] = ("weight", "master", "exp_avg", "exp_avg_sq")
    for name in one.names():
        for what in whats if one.is_full else whats[:1]:
            a, b = one.tensor(name, what), other.tensor(name, what)
            assert a.dtype == b.dtype and torch.equal(a, b), f"{what} of {name} differs"


def history(run: Path) -> dict[int, tuple[int, float, float]]:
    """Samples after, loss and gradient norm of each step logged; AssertionError where one stands twice."""
    steps: dict[int, tuple[int, float, float]] = {}
    for line in (run / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            assert record["step"] not in steps, f"step {record['step']} is logged twice"
            steps[record["step"]] = (record["samples"], record["loss"], record["grad_norm"])
    return steps
