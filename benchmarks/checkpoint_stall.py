"""What a save costs the training loop: ours against torch.distributed.checkpoint's `async_save` and `torch.save`.

    python -m benchmarks.checkpoint_stall RECIPE [key=value ...] [--ranks 2] [--rounds 5]

Every rank trains on random rows and saves the same tensors (weights, fp32 masters, both moments of its ZeRO shard)
in each way in turn, `rounds` times, to the same disk. Reported per save, as medians over rounds, of rank 0:

    stall       the loop stands still in the call
    slowdown    what the steps beside the write take longer than the median step without one; where ranks leave no core
                free, as on a small machine, it is the write's own work, and other programs' noise
    CPU         processor time of the rank beyond what its steps take: the work of a save, which noise disturbs least
    durable     from the call until the save says it is done; ours and DCP's are then flushed to the disk, ours is read
                back and compared besides; torch.save's is in the page cache only
    share       stall / 10 minutes, the cadence of the recipes

On a machine with GPUs start one process a GPU with torchrun instead; --ranks is for processes forked on a CPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megatron_patch.model import counts
from megatron_patch.parallel import device
from megatron_patch.recipe import Recipe, load
from megatron_patch.train.checkpoint.format import State, stored_whats
from megatron_patch.train.checkpoint.save import HostCopy, Saver
from megatron_patch.train.step import Trainer
from tests.ranks import run_ranks
from tests.toy import toy_shard, toy_trainer

CADENCE = 600.0
Save = Callable[[Path], Callable[[], bool]]  # begins a save into a folder; the result tells whether it is done


@dataclass
class Cost:
    stall: float
    slowdown: float
    cpu: float
    durable: float


class Usual(NamedTuple):
    """Seconds of a step without a save beside it."""

    wall: float
    cpu: float


def measure(recipe: Recipe, rounds: int, root: Path) -> dict[str, list[Cost]]:
    """On a rank: costs of each round by way of saving."""
    trainer = toy_trainer(recipe)
    shard = toy_shard(trainer, 0)

    def step() -> float:
        start = device.synchronized_time()
        trainer.step(shard, 1e-4)
        return device.synchronized_time() - start

    for _ in range(3):
        step()
    begun = time.process_time()
    usual = Usual(statistics.median(step() for _ in range(10)), (time.process_time() - begun) / 10)
    ways = {"ours": ours(trainer), "dcp.async_save": dcp_async(trainer), "torch.save": plain(trainer)}
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first round allocates host buffers and is not counted
        for name, save in ways.items():
            cost = one_save(save, root / name, step, usual)
            if number:
                costs[name].append(cost)
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(root / name)
            dist.barrier()
    return costs


def one_save(save: Save, folder: Path, step: Callable[[], float], usual: Usual) -> Cost:
    """Save beside training; every rank takes the same number of steps, until all are done."""
    start, cpu = device.synchronized_time(), time.process_time()
    is_done = save(folder)
    stall = time.perf_counter() - start
    beside, durable = [], None
    while True:
        if durable is None and is_done():
            durable = time.perf_counter() - start
        waiting = torch.tensor([durable is None], dtype=torch.int32, device=device.current())
        dist.all_reduce(waiting)
        if not waiting.item():
            break
        beside.append(step())
    assert durable is not None
    cpu = time.process_time() - cpu - usual.cpu * len(beside)
    return Cost(stall, sum(beside) - usual.wall * len(beside), cpu, durable)


def ours(trainer: Trainer) -> Save:
    saver = Saver(trainer.recipe, trainer.topology, trainer.optimizer)
    state = State(step=1, samples=1, tokens=1, optimizer_step=1, data_digest=None)

    def save(folder: Path) -> Callable[[], bool]:
        saver.save(folder, state, "full", lambda saved: None)
        return lambda: saver._thread is not None and not saver._thread.is_alive()

    return save


def tensors_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What our save copies, on the device: this rank's shards under names no other rank uses."""
    copy = HostCopy(trainer.optimizer, trainer.topology)
    rank = trainer.topology.rank
    return {
        f"{rank}.{group}.{what}": copy._shard(group, what)
        for group in range(len(trainer.optimizer.groups))
        for what in stored_whats("full", trainer.recipe.precision)
    }


def dcp_async(trainer: Trainer) -> Save:
    group = dist.new_group(backend="gloo")

    def save(folder: Path) -> Callable[[], bool]:
        future: Any = dcp.async_save(tensors_of(trainer), checkpoint_id=folder, process_group=group)
        return future.done

    return save


def plain(trainer: Trainer) -> Save:
    def save(folder: Path) -> Callable[[], bool]:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(tensors_of(trainer), folder / f"{trainer.topology.rank}.pt")
        return lambda: True

    return save


def report(costs: dict[str, list[Cost]], recipe: Recipe, ranks: int) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
    megabytes = 14 * counts.parameters(recipe.model).unique / 1e6
    print(f"{time.strftime('%Y-%m-%d')}, {device.name()}, {os.cpu_count()} cores, {commit.strip()}")
    print(f"{recipe.name}, {recipe.precision}, {ranks} ranks, {megabytes:,.0f} MB a save\n")
    print("| save | stall | slowdown | CPU | durable | share of a 10-minute cadence |\n|---|---|---|---|---|---|")
    medians = {
        name: Cost(*map(statistics.median, zip(*map(astuple, rounds), strict=True))) for name, rounds in costs.items()
    }
    for name, cost in medians.items():
        share = cost.stall / CADENCE
        milliseconds = " | ".join(f"{1000 * value:.1f} ms" for value in (cost.stall, cost.slowdown, cost.cpu))
        print(f"| {name} | {milliseconds} | {cost.durable:.2f} s | {share:.4%} |")
    peer, mine = medians["dcp.async_save"], medians["ours"]
    print(f"\nours / dcp.async_save: stall {mine.stall / peer.stall:.2f}, CPU {mine.cpu / peer.cpu:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    args = parser.parse_intermixed_args()
    recipe = load(args.recipe, args.overrides)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if "RANK" in os.environ:
            from megatron_patch.parallel import topology

            device.use(int(os.environ["LOCAL_RANK"]))
            topology.initialize(recipe.parallel)
            root = [folder]
            dist.broadcast_object_list(root)
            answers = [measure(recipe, args.rounds, Path(root[0]))]
            if dist.get_rank() == 0:
                report(answers[0], recipe, dist.get_world_size())
        else:
            answers = run_ranks(args.ranks, measure, recipe, args.rounds, Path(folder), timeout=1200)
            report(answers[0], recipe, args.ranks)


if __name__ == "__main__":
    main()
