"""What a process does before training: its place among the ranks, its processors, a record of its surroundings.

The same command runs alone, under torchrun and under srun with one task a rank. No torch here, so that the launcher's
own steps on a login or batch host start at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, MutableMapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from data_tools.files.bounded_json import load_bounded

FIRST_PORT, NUM_PORTS = 10_000, 20_000
_MOST_NODES = 100_000  # of a Slurm cluster


class LaunchError(ValueError):
    """A process that cannot take its place among the ranks: names the variable and what to do."""


class WaitEnded(Exception):
    """A rank that was asked to end while it waited for others: says by what, and for whom it waited."""


def setup_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT where they are missing.

    torchrun has set them already. In a Slurm step they come from SLURM_*; anywhere else the process is a world of one.
    A batch script is no step: SLURM_PROCID is set there too, but no other rank would ever come.
    Raises LaunchError where some of what a launcher sets together is set and the rest is not, or makes no sense: such a
    process would wait for ranks that nobody starts, or train as if it were alone.
    """
    if "RANK" in environment:
        _check_place(environment, "unset RANK to run alone")
        return
    for name in _PLACE[1:]:
        if name in environment:
            raise LaunchError(
                f"{name} is set in the environment, but RANK is not; start with torchrun or srun, or unset {name} to "
                "run alone"
            )
    if "SLURM_STEP_ID" in environment:
        place = _place_in_step(environment)
        place |= {name: environment[name] for name in ("MASTER_ADDR", "MASTER_PORT") if environment.get(name)}
        _check_place(place, "unset SLURM_STEP_ID to run alone")
    else:
        for name, alone in _MPI.items():
            if environment.get(name, alone) != alone:
                raise LaunchError(
                    f"{name} is {environment[name]!r} in the environment: mpirun or its like has started several "
                    "processes, of which each would train by itself; start with torchrun or srun, or unset "
                    f"{name} to run alone"
                )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in place.items():
        environment[name] = environment.get(name) or value


_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MPI = {
    **dict.fromkeys(("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS"), "1"),
    **dict.fromkeys(("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "MPI_LOCALRANKID"), "0"),
    **dict.fromkeys(("PALS_RANKID", "FLUX_TASK_RANK", "JSM_NAMESPACE_RANK"), "0"),
}
"""What other launchers tell their processes -> what it is of a process that is alone."""
_LAST_PORT = 65535


def _place_in_step(environment: Mapping[str, str]) -> dict[str, str]:
    remedy = "start with srun, or unset SLURM_STEP_ID to run alone"
    try:
        tasks = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        node = int(environment["SLURM_NODEID"])
        if node < 0:
            raise ValueError(f"SLURM_NODEID is {node}")
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "LOCAL_WORLD_SIZE": str(tasks[node]),
            "MASTER_ADDR": first_host(environment["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": str(job_port(int(environment["SLURM_JOB_ID"]))),
        }
    except KeyError as error:
        raise LaunchError(f"SLURM_STEP_ID is set in the environment, but {error.args[0]} is not; {remedy}") from None
    except (ValueError, IndexError) as error:
        raise LaunchError(f"SLURM_* variables of the environment do not describe a step ({error}); {remedy}") from None


def _check_place(environment: Mapping[str, str], otherwise: str) -> None:
    remedy = f"start with torchrun or srun, or {otherwise}"
    place: dict[str, int] = {}
    for name in _PLACE:
        text = environment.get(name)
        if text is None:
            raise LaunchError(f"RANK is set in the environment, but {name} is not; {remedy}")
        if not (text.isascii() and text.isdecimal()) or len(text) > 9:
            raise LaunchError(f"{name} is {text!r} in the environment, not a number; {remedy}")
        place[name] = int(text)
    for one, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if place[one] >= place[size]:
            raise LaunchError(f"{one} is {place[one]}, but {size} is {place[size]}; {remedy}")
    local, world = place["LOCAL_WORLD_SIZE"], place["WORLD_SIZE"]
    if local > world:
        raise LaunchError(f"LOCAL_WORLD_SIZE is {local}, but WORLD_SIZE is {world}; {remedy}")
    # A node's ranks are counted in their order among all, whatever launcher counts.
    rank, local_rank, is_one_node = place["RANK"], place["LOCAL_RANK"], local == world
    if local_rank > rank or (is_one_node and local_rank != rank):
        raise LaunchError(
            f"LOCAL_RANK is {local_rank}, but RANK is {rank}" + " on the only node" * is_one_node + f"; {remedy}"
        )
    port = environment.get("MASTER_PORT")
    if port and not (port.isdecimal() and len(port) < 6 and int(port) <= _LAST_PORT):
        raise LaunchError(f"MASTER_PORT is {port!r} in the environment, not a port up to {_LAST_PORT}; {remedy}")


def raise_file_limit() -> None:
    """As many open files as the system allows this process: every group holds one for each other rank."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def check_threads(number: int) -> None:
    """Raises LaunchError where this process may not start so many: gloo would wait for ever for the missing one."""
    leave = threading.Event()
    threads = [threading.Thread(target=leave.wait, daemon=True) for _ in range(number)]
    try:
        for thread in threads:
            thread.start()
    except (RuntimeError, MemoryError) as error:
        started = sum(thread.is_alive() for thread in threads)
        raise LaunchError(
            f"{error} beside {started} on {platform.node()}, but process groups take {number}; give the process more "
            "address space (`ulimit -v`) and more processes (`ulimit -u`, the container's pids limit)"
        ) from None
    finally:
        leave.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line (on standard output) that may get lost: a terminal that is gone or a full disk ends no training."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        nowhere = os.open(
            os.devnull, os.O_WRONLY
        )  # or what is buffered would fail again, at the end with exit code 120
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def complain(text: str) -> None:
    """Say on standard error why this process ends, and to torchrun, whose own last words repeat it then."""
    say(text, sys.stderr)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            write_json(Path(file), content)


def job_port(job_id: int) -> int:
    """Port of a job's rendezvous on its first node.

    Two jobs on one node clash only if their numbers are a multiple of 20,000 apart, and the range lies below the
    ports that Linux hands out to outgoing connections (from 32,768).
    """
    return FIRST_PORT + job_id % NUM_PORTS


def first_host(nodelist: str) -> str:
    """First name of a Slurm node list: `dgx[03-05,9],login1` is dgx03."""
    head = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodelist)
    if head is None or not head.group():
        raise ValueError(f"{nodelist!r} is not a Slurm node list")
    return "".join(part or "" for part in head.groups())


def tasks_per_node(counts: str) -> list[int]:
    """Tasks of each node from Slurm's short form: `8(x3),4` is [8, 8, 8, 4]."""
    tasks: list[int] = []
    for part in counts.split(","):
        count, _, repeat = part.partition("(x")
        if (nodes := int(repeat.rstrip(")") or 1)) > _MOST_NODES:
            raise ValueError(f"{counts!r} is of {nodes} nodes")
        tasks += [int(count)] * nodes
    return tasks


def check_rank_map(tensor: int, local_world_size: int) -> None:
    """Refuse a tensor group that would leave its node: ranks are numbered node by node, tensor ranks are neighbours.

    Raises ValueError with the remedy.
    """
    if local_world_size % tensor:
        raise ValueError(
            f"parallel.tensor {tensor} on nodes of {local_world_size} ranks: {local_world_size} / {tensor} = "
            f"{local_world_size / tensor:g}, so a tensor group would span two nodes; choose a divisor of "
            f"{local_world_size}"
        )


def bind_to_gpu(local_rank: int, sysfs: Path = Path("/sys")) -> set[int]:
    """Bind this process to processors next to its GPU and return them; empty where there is no GPU.

    GPUs on one NUMA node share its processors evenly. Memory follows by first touch, and NCCL picks the network card
    nearest to the GPU itself.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    if not visible:  # hidden, to run on the CPU
        return set()
    buses = gpu_query("pci.bus_id")
    if all(part.isdigit() for part in visible.split(",")):  # absent or UUIDs: the order of nvidia-smi
        buses = [buses[int(part)] for part in visible.split(",") if int(part) < len(buses)]
    near = [_processors_near(sysfs, bus) for bus in buses]
    if local_rank >= len(near):
        return set()
    allowed = os.sched_getaffinity(0)
    mine = near[local_rank]
    neighbours = [i for i, processors in enumerate(near) if processors == mine]
    usable = sorted(set(mine) & allowed)
    share = set(usable[neighbours.index(local_rank) :: len(neighbours)])
    if share:
        os.sched_setaffinity(0, share)
    return share


def _processors_near(sysfs: Path, bus: str) -> tuple[int, ...]:
    domain, rest = bus.lower().split(":", 1)
    try:
        text = (sysfs / "bus/pci/devices" / f"{domain[-4:]}:{rest}" / "local_cpulist").read_text().strip()
    except FileNotFoundError:  # a container that hides the bus
        return ()
    processors: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        processors += range(int(first), int(last or first) + 1)
    return tuple(processors)


def gpu_query(*fields: str) -> list[str]:
    """One line for each GPU with nvidia-smi's answer to the fields; empty where there is no NVIDIA driver."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def snapshot(recipe: Mapping[str, Any], nodes: Sequence[str] = ()) -> dict[str, Any]:
    """What an attempt ran on and with: recipe, revision, packages, driver, nodes and the variables that matter."""
    root = Path(__file__).resolve().parent.parent
    return {
        "command": sys.argv,
        "host": socket.gethostname(),
        "nodes": list(nodes),
        "git": _git(root, "rev-parse", "HEAD"),
        "git_changes": _git(root, "status", "--porcelain").splitlines(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "packages": dict(sorted({d.metadata["Name"]: d.version for d in metadata.distributions()}.items())),
        "gpus": gpu_query("name", "driver_version", "vbios_version", "serial"),
        "variables": {
            k: v
            for k, v in sorted(os.environ.items())
            if k.startswith(("NCCL_", "TORCH_", "CUDA_", "SLURM_", "SITE_", "OMP_", "UCX_", "PYTORCH_"))
        },
        "recipe": dict(recipe),
    }


def _git(root: Path, *arguments: str) -> str:
    """Output of a git command; empty where there is no git or no repository, as in a container image."""
    # A checkout shared by several users is owned by one of them; git would refuse to read it for the others.
    git = ["git", "-c", f"safe.directory={root}", "-C", str(root)]
    try:
        done = subprocess.run([*git, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def read_json(path: Path) -> dict[str, Any]:
    """Content of a file that `write_json` wrote; empty where there is none or it was damaged since."""
    try:
        content = load_bounded(path)
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file that is never seen half-written: beside, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
