"""Real ranks for tests: processes forked from the test process, joined over gloo.

Importing torch and Megatron takes seconds a process; a fork of a parent that has imported them takes none. Ranks meet
through a file, so no two runs can share a port.

Under TESTS_ON_GPU=1 a fork could not use the GPU that its parent has used: one rank is then a new process, which makes
its own group, and several are left to the CPU.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

_ON_GPU = os.environ.get("TESTS_ON_GPU") == "1"
_CONTEXT: Any = multiprocessing.get_context("spawn" if _ON_GPU else "fork")


class RankFailed(AssertionError):
    """A rank raised or died; the message holds its traceback or exit code."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """Run `function(*args)` on `world_size` forked ranks with a process group; return their results in rank order.

    RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are set as torchrun sets them. Results travel through torch.save.
    Raises RankFailed with the first failing rank's traceback after killing the others.
    """
    if _ON_GPU and world_size > 1:
        pytest.skip(f"{world_size} ranks on one GPU; `make test` runs them on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receive, send = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(target=_rank, args=(rank, world_size, folder, send, function, args), daemon=True)
            process.start()
            send.close()
            pipes.append(receive)
            processes.append(process)
        try:
            return _collect(pipes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout)
        if not ready:
            raise RankFailed(f"ranks {sorted(waiting.values())} gave no result within {timeout:g} s")
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[call-overload]
            try:
                ok, payload = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)  # type: ignore[union-attr]
            except EOFError:
                raise RankFailed(f"rank {rank} died without a word") from None
            if not ok:
                raise RankFailed(f"rank {rank} raised:\n{payload}")
            results[rank] = payload
    return [results[rank] for rank in sorted(results)]


def _rank(
    rank: int, world_size: int, folder: str, send: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    size = str(world_size)
    os.environ.update(RANK=str(rank), WORLD_SIZE=size, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=size)
    torch.set_num_threads(1)
    try:
        if _ON_GPU:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # there may be no other
        else:
            store = dist.FileStore(str(Path(folder) / "store"), world_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=2))
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    send.send_bytes(buffer.getvalue())
    # A peer may still be talking to this rank; the parent kills both once it has every answer.
    send.close()
    multiprocessing.Event().wait()
