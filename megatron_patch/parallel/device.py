"""GPU, or CPU with gloo: the only room that knows which.

Everything else asks this module for the device, the backend and the clock, so that the code for the cluster is the
code under test.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from megatron_patch.launch import LaunchError
from megatron_patch.parallel.gpus import PEAK_FLOPS
from megatron_patch.parallel.meeting import meet

_SLOWEST_START = timedelta(minutes=10)  # between the first rank's start and the last one's
HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it had to guess


def use(local_rank: int) -> torch.device:
    """Bind this process to its GPU (or to the CPU) and return the device.

    Where each process of a node sees one GPU alone (Slurm's --gpus-per-task), that is its own. Raises LaunchError where
    it sees several and none is left for this rank.
    """
    if HAS_GPU:
        visible = torch.cuda.device_count()
        shared = visible > 1 or "TORCHELASTIC_RUN_ID" in os.environ  # torchrun shows all of its ranks the same
        if local_rank >= visible and shared:
            raise LaunchError(
                f"rank {local_rank} of its node, counted from 0, but it sees {visible} GPU{'s' * (visible > 1)}; start "
                "one rank a GPU (SITE_RANKS_PER_NODE in slurm/site.sh, torchrun --nproc-per-node), or hide them to run "
                "on the CPU: CUDA_VISIBLE_DEVICES="
            )
        torch.cuda.set_device(local_rank if visible > 1 else 0)
    return current()


def current() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if HAS_GPU else torch.device("cpu")


def make_deterministic() -> None:
    """The same bits in every run of a layout: deterministic kernels, one collective algorithm.

    Call it before the process group and the first matrix product. The rank map must be the same too.
    """
    os.environ |= {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
    torch.use_deterministic_algorithms(True)
    # Else every torch.empty would be written twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def init_process_group(
    timeout: timedelta, patience: timedelta = _SLOWEST_START, asked: Callable[[], str | None] = lambda: None
) -> None:
    """Join the job named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; a job of one rank needs no port.

    `timeout` is that of a collective. Ranks wait for each other for `patience`, or until `asked` returns a reason to
    give up. Raises LaunchError where they cannot meet, WaitEnded where `asked` ended it.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives that `flight_record` remembers
    backend = "nccl" if HAS_GPU else "gloo"
    if int(os.environ["WORLD_SIZE"]) == 1:
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    else:
        address, port = (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
        if not address or not port:
            raise LaunchError("MASTER_ADDR and MASTER_PORT say where ranks meet, but are not set; start with torchrun")
        try:
            store = meet(address, int(port), patience, asked)
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            # Without device_id: with it NCCL would make every one of mcore's groups at once, and out of one another.
            torch.distributed.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=timeout
            )
        except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
            raise LaunchError(
                f"ranks cannot meet at {address}, port {port}: {error}; if the port is in use, set another MASTER_PORT "
                "(torchrun: --master-port, or --standalone), else see that every node resolves and reaches that address"
            ) from None


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because a rank at its other end is gone: that rank is the cause, not this one."""
    if isinstance(error, torch.distributed.DistNetworkError | torch.distributed.DistStoreError):
        return True
    signs = ("closed by peer", "reset by peer", "Broken pipe", "ncclRemoteError", "communicator was aborted")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def flight_record() -> bytes:
    """The last collectives of this process and their state, as JSON: torch's flight recorder."""
    c10d: Any = torch._C._distributed_c10d
    if HAS_GPU and hasattr(c10d, "_dump_nccl_trace_json"):
        return c10d._dump_nccl_trace_json()
    return c10d._dump_fr_trace_json()


def name() -> str:
    return torch.cuda.get_device_name() if HAS_GPU else "CPU"


def uuid() -> str:
    """Names this process's GPU among all there are."""
    return str(torch.cuda.get_device_properties(current()).uuid)


def peak_flops() -> float | None:
    """Dense bf16 peak of this device in FLOP/s, or None where it is not known."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name()), None)


def synchronized_time() -> float:
    """Seconds on a monotonic clock, after all queued work."""
    if HAS_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


class Moment:
    """A point in this rank's queue of work for the device, marked without waiting for it."""

    def __init__(self) -> None:
        if HAS_GPU:
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._time = time.perf_counter()

    def wait(self) -> None:
        """Until the device has passed it."""
        if HAS_GPU:
            self._event.synchronize()

    def since(self, earlier: Moment) -> float:
        """Seconds of the device's time since an earlier moment; it must have passed both."""
        if HAS_GPU:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._time - earlier._time


def peak_memory() -> int | None:
    """Highest bytes allocated on the GPU since start, or None on a CPU."""
    return torch.cuda.max_memory_allocated() if HAS_GPU else None


def upload(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a host tensor to the device without waiting for it."""
    return tensor.pin_memory().to(current(), non_blocking=True) if HAS_GPU else tensor


def download(tensor: torch.Tensor) -> torch.Tensor:
    """The host tensor into which `tensor` is being copied; whole once a Moment marked after this call has passed."""
    if not HAS_GPU:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
