"""The host stays ahead of the device: a step reads nothing back; its numbers are read while the next one computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import random
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_patch.train.step import Step, Trainer
from megatron_patch.train.watchdog import Ceiling
from tests.ranks import run_ranks
from tests.toy import toy_recipe, toy_shard, toy_trainer
from tests.train.job import Job, run_settings

aten = torch.ops.aten
# On a GPU each of these waits for the device: to give the host a value, to learn the size of the answer, or to copy
# numbers from host memory that is not pinned.
WAITS = {
    *(aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.allclose),
    *(aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount),
    *(aten.repeat_interleave, aten.histc),
}
METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "new_tensor")
FUNCTIONS = ("tensor", "as_tensor")


class NoWait(TorchDispatchMode):
    """Raises at the operation that would wait for a GPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = function.overloadpacket
        # x[mask] = number is a masked fill; any other use of a mask counts its places first.
        by_mask = packet is aten.index or (packet in (aten.index_put, aten.index_put_) and args[2].numel() > 1)
        masked = by_mask and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        assert packet not in WAITS and not masked, f"{function} would wait for the device"
        return function(*args, **(kwargs or {}))


@contextmanager
def no_wait() -> Iterator[None]:
    """The same for what reads or makes a CPU tensor without an operation."""

    def refuse(name: str, real: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            if name in FUNCTIONS and kwargs.get("device") is None:  # stays with the host
                return real(*args, **kwargs)
            raise AssertionError(f"{name} would wait for the device")

        return called

    places = [*((torch.Tensor, name) for name in METHODS), *((torch, name) for name in FUNCTIONS)]
    own = [vars(place).get(name) for place, name in places]
    for place, name in places:
        setattr(place, name, refuse(name, getattr(place, name)))
    try:
        with NoWait():
            yield
    finally:
        for (place, name), before in zip(places, own, strict=True):
            delattr(place, name) if before is None else setattr(place, name, before)


def steps_without_waiting(overrides: list[str]) -> list[tuple[float, ...]]:
    """Three steps, read at the end."""
    # mcore compares two states of the CPU's generator around the embedding: host memory on a GPU too.
    random.CudaRNGStatesTracker.fork = lambda *_: nullcontext()
    trainer = toy_trainer(toy_recipe(*overrides))
    shards = [toy_shard(trainer, number) for number in range(3)]
    steps = []
    for shard in shards:
        with no_wait():
            trainer.compute(shard)
            steps.append(trainer.update(1e-3, request=1.0, ceiling=Ceiling(5.0, 100.0), joules=2.5))
    return [tuple(step.result()) for step in steps]


def steps_read_one_by_one(overrides: list[str]) -> list[tuple[float, ...]]:
    trainer = toy_trainer(toy_recipe(*overrides))
    return [tuple(trainer.step(toy_shard(trainer, number), 1e-3)) for number in range(3)]


LAYOUTS = {
    "one rank": (1, []),
    "DP2, buckets, full recompute": (2, ["parallel.reduce_bucket=5000", "recompute=full"]),
    "ZeRO-2 on DP2, bf16": (2, ["parallel.zero_stage=2", "precision=bf16", "recompute=selective"]),
    "TP2+SPxPP2": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]),
    "PP2xVPP2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_reads_nothing_back(layout: str) -> None:
    ranks, overrides = LAYOUTS[layout]
    without = run_ranks(ranks, steps_without_waiting, overrides)
    one_by_one = run_ranks(ranks, steps_read_one_by_one, overrides)
    for loss, norm, request, joules, applied in without[0]:
        assert request == ranks and joules == 2.5 * ranks and applied and loss > 0 and norm > 0
    for ahead, read in zip(without[0], one_by_one[0], strict=True):
        assert ahead[:2] == read[:2]


def reads_a_number(name: str) -> None:
    x = torch.ones(3)
    with no_wait():
        {
            "item": lambda: x[0].item(),
            "tolist": lambda: x.tolist(),
            "if": lambda: bool(x[0] > 0),
            "mask": lambda: x[x > 0],
            "nonzero": lambda: x.nonzero(),
            "new_tensor": lambda: x.new_tensor(1.0),
            "tensor": lambda: torch.tensor(1.0, device="cpu"),
            "format": lambda: f"{x[0]:.2f}",
        }[name]()


@pytest.mark.parametrize("name", ["item", "tolist", "if", "mask", "nonzero", "new_tensor", "tensor", "format"])
def test_the_guard_sees_a_read(name: str) -> None:
    with pytest.raises(AssertionError, match="would wait for the device"):
        reads_a_number(name)
    assert torch.ones(2).tolist() == [1.0, 1.0]


def test_numbers_are_read_while_the_next_step_computes(data_folder: Path, tmp_path: Path) -> None:
    events = tmp_path / "events"

    def before(rank: int) -> None:
        if rank:
            return

        def note(event: str) -> None:
            with events.open("a") as file:
                file.write(f"{event}\n")

        compute, update, result = Trainer.compute, Trainer.update, Step.result

        def noted_compute(self: Trainer, *args: Any) -> Any:
            note("compute")
            return compute(self, *args)

        def noted_update(self: Trainer, *args: Any) -> Any:
            note("update")
            return update(self, *args)

        def noted_result(self: Step) -> Any:
            note("read")
            return result(self)

        Trainer.compute, Trainer.update, Step.result = noted_compute, noted_update, noted_result  # type: ignore[method-assign]

    settings = run_settings(data_folder, tmp_path / "run", "run.steps=7", "data.held_out_interval=3")
    Job(4, settings, tmp_path / "log", before).run()
    ahead, at_once = ["compute", "read", "update"], ["read"]
    expected = [
        *("compute", "update", *ahead),
        *(*ahead, *at_once),  # step 3 is scored
        *("compute", "update", *ahead, *ahead, *at_once),  # step 6 is scored
        *("compute", "update", *at_once),  # step 7 is the last
    ]
    assert events.read_text().split() == expected
    records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 7]
    # From the end of one step to the end of the next: no step has another's work counted with its own.
    seconds = [r["seconds"] for r in records if "seconds" in r]
    assert len(seconds) == 7 and min(seconds) > 0
