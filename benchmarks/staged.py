"""Collectives of several ranks on one GPU: a torch.distributed backend that takes them through host memory.

NCCL refuses two ranks on one GPU, and gloo takes CUDA tensors in some collectives alone. This backend copies what a
collective reads to the host, runs it on gloo there, and copies what it wrote back before `wait` returns. It serves what
training calls and refuses the rest by name. For proofs on one GPU; it is slow, and training never takes it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

NAME = "staged"
# torch 2.13 calls a group's method by the first name; torch 2.11, and gloo in both, know it by the second.
_RENAMED = {"all_gather_single": "_allgather_base", "reduce_scatter_single": "_reduce_scatter_base"}
# The group's methods by what they do to their first argument.
_WRITE = ("allreduce", "broadcast", "allgather", "recv", *_RENAMED, *_RENAMED.values())
_READ = ("send", "barrier")
_REFUSED = ("reduce", "gather", "scatter", "reduce_scatter", "recv_anysource", "monitored_barrier")
_REFUSED += ("alltoall", "alltoall_base", "all_to_all_single")
_REFUSED += ("allreduce_coalesced", "allgather_coalesced", "_start_coalescing", "_end_coalescing")
_REFUSED += ("allgather_into_tensor_coalesced", "all_gather_single_coalesced")
_REFUSED += ("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced")


class _Work(dist.Work):
    """A collective under way on the host."""

    def __init__(self, work: Any, written: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self._work, self._written = work, written

    def is_completed(self) -> bool:
        return not self._written and self._work.is_completed()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Until the caller's tensors hold the result, whichever stream reads them next."""
        self._work.wait()
        for target, host in self._written:
            target.data.copy_(host)  # past autograd, as a backend in C++ writes
            if target.is_cuda:
                torch.cuda.current_stream(target.device).synchronize()
        self._written = []
        return True


class StagedGroup(dist.ProcessGroup):
    """A process group whose collectives run on the host by `gloo`, whatever device their tensors are on."""

    def __init__(self, gloo: Any, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._gloo, self._size = gloo, size

    def size(self) -> int:
        return self._size

    def getBackendName(self) -> str:
        return NAME

    def _run(self, name: str, arguments: tuple[Any, ...], writes: bool) -> _Work:
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []

        def to_host(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            # A copy into pageable memory returns when the current stream, which made the tensor, has done it.
            host = value.detach().to("cpu", copy=True).contiguous()
            copies.append((value, host))
            return host

        staged = [tree_map(to_host, argument) for argument in arguments[:1]]
        written = list(copies) if writes else []
        staged += [tree_map(to_host, argument) for argument in arguments[1:]]
        assert all(host.device.type == "cpu" for _, host in copies)
        return _Work(getattr(self._gloo, _RENAMED.get(name, name))(*staged), written)


def _served(name: str, writes: bool) -> Any:
    def collective(self: StagedGroup, *arguments: Any, **options: Any) -> _Work:
        return self._run(name, (*arguments, *options.values()), writes)

    return collective


def _refused(name: str) -> Any:
    def collective(self: StagedGroup, *_: Any, **__: Any) -> None:
        raise NotImplementedError(f"{name}: several ranks on one GPU are not served it (benchmarks/staged.py)")

    return collective


for _name in (*_WRITE, *_READ):
    setattr(StagedGroup, _name, _served(_name, _name in _WRITE))
for _name in _REFUSED:
    setattr(StagedGroup, _name, _refused(_name))


def _make(store: dist.Store, rank: int, size: int, timeout: timedelta) -> StagedGroup:
    return StagedGroup(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size)


def register() -> None:
    """Let torch.distributed know the backend by NAME; harmless when repeated."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _make, devices=["cpu", "cuda"])
