"""Find sick nodes before a run: `python -m megatron_patch check RECIPE --folder F` under srun or torchrun.

Every rank measures its device and its node; then nodes all-reduce in pairs, in rounds with changing partners, so that
a failing pair can be blamed on one of its two; then all fit nodes together. Nothing is taken on trust: each
measurement runs in a forked child with a deadline, so a hang or an abort costs that measurement and no more, and the
ranks talk through files in F on the shared file system (judge.py), which works when the network under test does not.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

# The parent forks its measurements, and a process in which CUDA was ever initialised cannot be forked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
import torch.distributed as dist

from data_tools.files.bounded_json import load_bounded
from megatron_patch import launch, recipe
from megatron_patch.parallel import device
from megatron_patch.parallel.gpus import GIB
from megatron_patch.preflight.judge import PHASES, Limits, judge

Result = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much a measurement moves: enough on a GPU to reach its pace, little on a CPU."""

    gemm: int  # side of the square matrices
    copy: int  # bytes
    file: int  # bytes a node writes and reads back
    all_reduce: tuple[int, ...]  # bytes, rising; the last one is what nodes are judged by


SIZE = (
    Size(8192, 4 * GIB, 4 * GIB, (2**10, 2**20, 2**25, GIB))
    if device.HAS_GPU
    else Size(256, 2**24, 2**23, (2**10, 2**14, 2**18))
)


def main(args: argparse.Namespace) -> int:
    """Exit code 0: every node is fit; 1 (of rank 0): some are not (F/bad); 2: refused."""
    launch.setup_environment()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        settings = recipe.load(args.recipe, args.overrides)
        launch.check_rank_map(settings.parallel.tensor, int(os.environ["LOCAL_WORLD_SIZE"]))
    except ValueError as error:
        if rank == 0:
            launch.complain(f"refused: {error}")
        return 2
    folder = args.folder or settings.run_folder / "check" / name_of_start()
    folder.mkdir(parents=True, exist_ok=True)
    if answer_file(folder, "node", rank).exists():
        launch.complain(f"refused: {folder} holds answers of an earlier check; name a new --folder")
        return 2
    hosts = hosts_of_ranks(folder, world_size)
    if rank == 0:
        limits = Limits(args.slow, args.slow_network, args.slow_disk, args.patience)
        thread = threading.Thread(target=judge, args=(folder, hosts, limits), name="judge", daemon=True)
        thread.start()
    take_part(folder, rank, hosts[rank], settings.run_folder / "checkpoints", args.patience)
    bad = (folder / "bad").read_text().splitlines()
    if rank == 0:
        print(*bad, f"fit nodes: {len((folder / 'good').read_text().split())}; details in {folder}", sep="\n")
    return 1 if bad and rank == 0 else 0  # one voice is enough


def name_of_start(environment: Mapping[str, str] = os.environ) -> str:
    """A name that the ranks of one start share, and no other start has."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return environment["TORCHELASTIC_RUN_ID"]
    if "SLURM_STEP_ID" in environment:
        return f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"
    return f"{socket.gethostname()}-{os.getpid()}-{time.time():.0f}"


def hosts_of_ranks(folder: Path, world_size: int) -> list[str]:
    """The host of each rank: F/hosts, which the launcher writes, or this host where there is no launcher."""
    try:
        return (folder / "hosts").read_text().split()
    except FileNotFoundError:
        return [socket.gethostname()] * world_size


def take_part(folder: Path, rank: int, host: str, checkpoints: Path, patience: float) -> None:
    """Measure, then follow the judge's plans until there is a verdict."""
    answer(folder, "node", rank, lambda: measure_node(checkpoints), patience)
    for phase in PHASES:
        groups = wait_for_file(folder / f"{phase}.plan.json", 3 * patience)["groups"]
        if ranks := next((group for group in groups if rank in group), None):
            meeting = folder / f"{phase}.{ranks[0]}.store.json"
            all_reduce = partial(measure_all_reduce, meeting, host, ranks.index(rank), len(ranks), patience)
            answer(folder, phase, rank, all_reduce, patience)
    wait_for_file(folder / "verdict.json", 3 * patience)


def answer(folder: Path, phase: str, rank: int, measure: Callable[[], Result], patience: float) -> None:
    launch.write_json(answer_file(folder, phase, rank), in_child(measure, patience))


def answer_file(folder: Path, phase: str, rank: int) -> Path:
    return folder / f"{phase}.{rank}.json"


def in_child(measure: Callable[[], Result], patience: float) -> Result:
    """The measurement's result, or {"error": ...} where it raised, died or took longer than `patience` seconds."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def child() -> None:
        try:
            send.send(measure())
        except Exception as error:
            send.send({"error": f"{type(error).__name__}: {error}".splitlines()[0]})

    process = context.Process(target=child, daemon=True)
    process.start()
    send.close()
    try:
        if receive.poll(patience):
            result: Result = receive.recv()
            return result
        return {"error": f"no answer after {patience:g} s"}
    except EOFError:
        process.join()
        return {"error": f"the measurement died with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def measure_node(checkpoints: Path) -> Result:
    """This rank's device, and for the node's first rank its driver's complaints and the disk below `checkpoints`."""
    local_rank = int(os.environ["LOCAL_RANK"])
    device.use(local_rank)
    result: Result = {"device": device.name()}
    result["gemm"] = gemm_flops(SIZE.gemm)
    result["copy"] = copy_bandwidth(SIZE.copy)
    if local_rank == 0:
        if complaint := driver_complaint(int(os.environ["LOCAL_WORLD_SIZE"])):
            result["error"] = complaint
        checkpoints.mkdir(parents=True, exist_ok=True)
        result["disk"], result["disk_read"] = disk_bandwidth(checkpoints, SIZE.file)
    return result


def gemm_flops(side: int) -> float:
    """FLOP/s of a bf16 (CPU: fp32) matrix product, the best of several; raises where the product is wrong."""
    dtype = torch.bfloat16 if device.HAS_GPU else torch.float32
    a = torch.ones(side, side, device=device.current(), dtype=dtype)
    b = torch.eye(side, device=device.current(), dtype=dtype)
    if not torch.equal(a @ b, a):
        raise ArithmeticError("a matrix times the identity is not itself")
    return 2 * side**3 / best_seconds(lambda: a @ b)


def copy_bandwidth(size: int) -> float:
    """Bytes/s read and written by a copy in device memory."""
    source = torch.zeros(size, dtype=torch.uint8, device=device.current())
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source))


def best_seconds(work: Callable[[], object], repeats: int = 10) -> float:
    times = []
    for _ in range(repeats):
        start = device.synchronized_time()
        work()
        times.append(device.synchronized_time() - start)
    return min(times)


def disk_bandwidth(folder: Path, size: int) -> tuple[float, float]:
    """Bytes/s of writing a file durably below `folder`, and of reading it back, not from memory; it is compared."""
    path = folder / f".check.{socket.gethostname()}.{os.getpid()}"
    block = os.urandom(min(size, 2**22))
    try:
        start = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(size // len(block)):
                file.write(block)
            os.fsync(file.fileno())
        written = time.perf_counter() - start
        start = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what is durable leaves the page cache
            if any(file.read(len(block)) != block for _ in range(size // len(block))):
                raise OSError(f"{folder}: a file reads back differently from what was written")
        read = time.perf_counter() - start
    finally:
        path.unlink(missing_ok=True)
    return size / written, size / read


def driver_complaint(num_ranks: int) -> str:
    """What nvidia-smi says against this node; empty where nothing does or there is no NVIDIA driver."""
    if not device.HAS_GPU:
        return ""
    fields = ("ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.hw_slowdown", "remapped_rows.failure")
    gpus = [line.split(", ") for line in launch.gpu_query(*fields)]
    if len(gpus) < num_ranks:
        return f"{len(gpus)} GPUs answer, {num_ranks} ranks need one each"
    for index, (ecc, slowdown, remap) in enumerate(gpus):
        if ecc.isdigit() and int(ecc):
            return f"GPU {index}: {ecc} uncorrected ECC errors since boot"
        if slowdown == "Active":
            return f"GPU {index}: slowed down by its hardware (power or heat)"
        if remap == "Yes":
            return f"GPU {index}: a memory row could not be remapped"
    return ""


def measure_all_reduce(meeting: Path, host: str, rank: int, world_size: int, patience: float) -> Result:
    """Bus bandwidth in bytes/s of an all-reduce over `world_size` ranks (2 (n-1)/n x bytes / seconds), and the seconds
    of each size.

    The first of them opens a store on a free port of its node and names it in the file `meeting`.
    """
    timeout = timedelta(seconds=patience)
    device.use(int(os.environ["LOCAL_RANK"]))
    if rank == 0:
        store = dist.TCPStore(host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        launch.write_json(meeting, {"host": host, "port": store.port})
    else:
        place = wait_for_file(meeting, patience)
        store = dist.TCPStore(place["host"], place["port"], world_size, is_master=False, timeout=timeout)
    dist.init_process_group(
        "nccl" if device.HAS_GPU else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
    )
    tensor = torch.ones(SIZE.all_reduce[-1] // 4, device=device.current())
    dist.all_reduce(tensor)
    if not torch.all(tensor == world_size):
        raise ArithmeticError("the sum of ones over ranks is not their number")
    seconds = {size: best_seconds(partial(dist.all_reduce, tensor[: size // 4]), repeats=3) for size in SIZE.all_reduce}
    dist.barrier()  # leave together: the store lives in the first rank
    largest = SIZE.all_reduce[-1]
    return {"all_reduce": 2 * (world_size - 1) / world_size * largest / seconds[largest], "seconds": seconds}


def wait_for_file(path: Path, patience: float) -> Any:
    """Content of a JSON file that another process will write; TimeoutError after `patience` seconds."""
    end = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{path} did not appear in {patience:g} s: its writer is gone")
        time.sleep(0.1)
    return load_bounded(path)
