"""What `check` measured on a site's nodes, in place of what data sheets and other machines say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_patch.launch import read_json
from megatron_patch.parallel.gpus import Gpu
from megatron_patch.plan.collectives import seconds, span
from megatron_patch.run.log import is_number


@dataclass(frozen=True)
class Disk:
    """Bytes/s that a node writes durably where checkpoints go, and reads there, while all nodes do."""

    write: float
    read: float | None = None
    """Not known of a check from before it was measured."""


def apply(gpu: Gpu, folder: Path) -> tuple[Gpu, Disk | None, str]:
    """The GPU with the rates of FOLDER/measured.json, the disk that was measured, and what they are of.

    The largest all-reduce gives the bandwidth: of NVLink where it stayed in a node, of the ports where it did not. The
    smallest one gives how much longer a collective takes to get through than NCCL's own table says.
    Raises ValueError where the file is missing or holds no such numbers.
    """
    file = folder / "measured.json"
    found = read_json(file)
    if not found:
        raise ValueError(f"{file}: missing or damaged; name the --folder of a `check` that has ended")
    numbers = [found.get(key) for key in ("ranks", "nodes", "gemm", "copy")]
    numbers += [found[key] for key in ("disk", "disk_read") if found.get(key) is not None]
    sizes = found.get("all_reduce")
    if (
        not isinstance(sizes, dict)
        or not all(is_number(n) and n > 0 for n in (*numbers, *sizes.values()))
        or not all(size.isdecimal() and int(size) for size in sizes)
    ):
        raise ValueError(f"{file}: holds no rates (no node was fit?); check the nodes again")
    ranks, nodes = int(found["ranks"]), int(found["nodes"])
    gpu = replace(gpu, matmul_flops=float(found["gemm"]), copy=float(found["copy"]))
    by_size = sorted((int(size), float(time)) for size, time in sizes.items())
    if ranks > 1 and by_size:
        largest, slowest = by_size[-1]
        bus = 2 * (ranks - 1) / ranks * largest / slowest
        network = gpu.network
        network = replace(network, nvlink=bus) if nodes == 1 else replace(network, node=bus)
        smallest, quickest = by_size[0]
        where = span("world", 1, ranks, 1, -(-ranks // nodes))
        usual = seconds("all-reduce", smallest, where, network, only_rings=False)
        gpu = replace(gpu, network=replace(network, latency=quickest / usual))
    network_of = "the network between them" if nodes > 1 else "no network between nodes"
    disk = None if found.get("disk") is None else Disk(found["disk"], found.get("disk_read"))
    return gpu, disk, f"measured on {ranks} ranks of {found.get('device')} on {nodes} nodes, {network_of} ({file})"
