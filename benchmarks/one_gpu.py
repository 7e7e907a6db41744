"""Layouts of several ranks on one GPU (or on the CPU) against one rank: losses, gradient norms, final weights.

    python -m benchmarks.one_gpu --out FOLDER [--seconds 120] [LAYOUT ...]

A toy model in fp32 with the reference kernels, so that nothing but the layout differs. As many processes as the largest
layout has ranks train every layout in turn; collectives go through the host (benchmarks/staged.py). `layouts.json` in
--out has the largest relative difference of each layout as soon as it is known. Exit status 1: a layout is further from
one rank than 1e-5, or did not end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import staged
from data_tools.files.durable import write_whole
from megatron_patch.parallel import device, topology
from tests.toy import gather, toy_recipe, train_toy

STEPS, TOLERANCE = 4, 1e-5
ONE = "one rank"
LAYOUTS = {  # in the order of their worth: what hangs or breaks takes what follows with it
    ONE: (1, []),
    "TP2": (2, ["parallel.tensor=2"]),
    "PP2": (2, ["parallel.pipeline=2"]),
    "DP2": (2, []),
    "TP2xPP2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "TP2+SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP2xVPP2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
}
ALL = [layout for layout in LAYOUTS if layout != ONE]
MODEL = ["model.num_ffns=1", "kernels=reference"]


def train(layout: str, rank: int, folder: Path) -> None:
    """On a rank without a process group: train a layout; what came of it is a file of its own in `folder`."""
    size, overrides = LAYOUTS[layout]
    staged.register()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(size))
    device.use(0)
    device.make_deterministic()  # or tensor-parallel ranks, which sum alike, might round apart
    store = dist.FileStore(str(folder / f"{layout}.store"), size)
    dist.init_process_group(staged.NAME, store=store, rank=rank, world_size=size, timeout=timedelta(minutes=1))
    try:
        answer = train_toy([*MODEL, *overrides], STEPS)
        part = folder / f"{layout}.{rank}.part"
        torch.save(answer, part)
        part.rename(part.with_suffix(".pt"))
    finally:
        topology.destroy()


def difference(layout: str, folder: Path) -> dict[str, float]:
    """The largest relative difference of losses, norms and weights from one rank. ValueError where ranks disagree."""
    answers, (reference,) = _answers(layout, folder), _answers(ONE, folder)
    for answer in answers:
        if not answer["replicas_equal"]:
            raise ValueError("a parameter differs between ranks that hold the same part of it")
        if (answer["losses"], answer["norms"]) != (answers[0]["losses"], answers[0]["norms"]):
            raise ValueError("ranks differ in losses or norms")
    weights = gather([reference], toy_recipe(*MODEL))
    trained = gather(answers, toy_recipe(*MODEL, *LAYOUTS[layout][1]))
    found = {
        name: max(abs(a - b) / abs(b) for a, b in zip(answers[0][name], reference[name], strict=True))
        for name in ("losses", "norms")
    }
    # Softmax takes the same from all keys: a key bias's gradient is rounding, of which Adam makes whole steps.
    kept = [name for name in weights if not name.endswith("k_proj.bias")]
    off = [((trained[name] - weights[name]).norm() / weights[name].norm()).item() for name in kept]
    return {**found, "weights": max(off)}


def verdict(found: dict[str, Any]) -> bool:
    """Whether every layout is within TOLERANCE of one rank; not a number is not."""
    return all(isinstance(of, dict) and all(value <= TOLERANCE for value in of.values()) for of in found.values())


def compare(layouts: list[str], out: Path, seconds: float) -> dict[str, Any]:
    """Train `layouts` and one rank; differences by layout, or what went wrong. Ranks that are left are killed."""
    end = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("*.store"), *out.glob("*.pt")):
        old.unlink()
    found: dict[str, Any] = dict.fromkeys(layouts, "did not end")
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(max(LAYOUTS[layout][0] for layout in layouts)):
            command = [sys.executable, "-m", "benchmarks.one_gpu", "--out", str(out), "--rank", str(rank), *layouts]
            with (out / f"rank{rank}.log").open("w") as log:
                ranks.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        waiting = list(layouts)
        while waiting and time.monotonic() < end:
            running = all(rank.poll() in (None, 0) for rank in ranks)  # asked before the files are looked for
            while waiting and _whole(ONE, out) and _whole(waiting[0], out):
                layout = waiting.pop(0)
                try:
                    found[layout] = difference(layout, out)
                except ValueError as error:
                    found[layout] = str(error)
                write_whole(out / "layouts.json", json.dumps(found, indent=1).encode() + b"\n")
            if waiting and not running:
                found[waiting[0]] = f"a rank ended: see {out}/rank*.log"
                break
            time.sleep(0.1)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        write_whole(out / "layouts.json", json.dumps(found, indent=1).encode() + b"\n")
    return found


def _whole(layout: str, folder: Path) -> bool:
    return all((folder / f"{layout}.{rank}.pt").exists() for rank in range(LAYOUTS[layout][0]))


def _answers(layout: str, folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{layout}.{rank}.pt") for rank in range(LAYOUTS[layout][0])]


def main() -> int:
    parser = argparse.ArgumentParser(description="Layouts of several ranks on one GPU against one rank")
    parser.add_argument("layouts", nargs="*", metavar="LAYOUT", help=f"of {', '.join(LAYOUTS)}; all without")
    parser.add_argument("--out", type=Path, default=Path("one_gpu"), help="folder for logs and results")
    parser.add_argument("--seconds", type=float, default=120, help="for all layouts")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    layouts = arguments.layouts or ALL
    if unknown := set(layouts) - set(LAYOUTS):
        parser.error(f"no layout {', '.join(sorted(unknown))}; there are {', '.join(LAYOUTS)}")
    if arguments.rank is None:
        found = compare(layouts, arguments.out, arguments.seconds)
        print(json.dumps(found, indent=1))
        return 0 if verdict(found) else 1
    torch.set_num_threads(1)
    for layout in dict.fromkeys([ONE, *layouts]):
        if arguments.rank < LAYOUTS[layout][0]:
            train(layout, arguments.rank, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
