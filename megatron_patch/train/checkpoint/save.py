"""Save while training goes on: the loop waits for the copy out of the device, a thread does the rest.

Every rank writes its own fragments (plan.py). Rank 0 hears from all that theirs are on disk, writes the index and
publishes the folder (write.py); then all ranks hear whether the checkpoint is durable.
"""

from __future__ import annotations

import os
import platform
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_patch.optim.zero import ShardedOptimizer
from megatron_patch.parallel import device
from megatron_patch.parallel.topology import Topology
from megatron_patch.recipe import Recipe
from megatron_patch.train.checkpoint.format import (
    CheckpointError,
    Contents,
    Fragment,
    Index,
    Marker,
    State,
    StoredFile,
    What,
    rank_file,
    stored_whats,
)
from megatron_patch.train.checkpoint.plan import ShardRange, fragment, local_ranges
from megatron_patch.train.checkpoint.write import finish, index_tensors, partial_folder, write_file
from megatron_patch.train.side_channel import SideChannel

_SLOWEST_WRITE = timedelta(hours=1)
_PAUSES = (0.1, 1.0, 5.0, 25.0)  # seconds: whoever deletes a folder may be at it for a while


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is durable."""

    folder: Path
    state: State
    contents: Contents
    digest: str
    bytes: int
    stall: float  # seconds the loop stood still
    seconds: float  # from the call to durable


class HostCopy:
    """Host memory for one rank's fragments, allocated once and filled anew for each save."""

    def __init__(self, optimizer: ShardedOptimizer, topology: Topology) -> None:
        self._optimizer = optimizer
        self._buffers: dict[tuple[int, What], torch.Tensor] = {}
        self._pieces: list[tuple[int, ShardRange, Fragment]] = []
        for i, group in enumerate(optimizer.groups):
            if group.replication.is_owner(topology.pipeline_rank, topology.tensor_rank):
                for piece in local_ranges(optimizer, i, topology.data_rank):
                    self._pieces.append((i, piece, fragment(piece, topology.tensor_rank, topology.tensor_size)))

    def fill(self, whats: tuple[What, ...]) -> dict[str, torch.Tensor]:
        """Copy the shards out of the device; views of the copy, one a fragment, by safetensors key."""
        for group in {i for i, _, _ in self._pieces}:
            for what in whats:
                source = self._shard(group, what)
                if (group, what) not in self._buffers:
                    self._buffers[group, what] = torch.empty(
                        source.shape, dtype=source.dtype, pin_memory=device.HAS_GPU
                    )
                self._buffers[group, what].copy_(source)
        return {
            stored.key(what): self._buffers[group, what][piece.low : piece.high]
            for group, piece, stored in self._pieces
            for what in whats
        }

    def _shard(self, group: int, what: What) -> torch.Tensor:
        if what == "weight":
            return self._optimizer.weight_shard(group)
        master = self._optimizer.master_shards[group]
        if what == "master":
            return master
        moments = self._optimizer.moments(group)
        return moments[what] if moments else torch.zeros_like(master)  # none before the first update


@dataclass(frozen=True)
class _Save:
    """What is to be written, and what is called then; see `Saver.save`."""

    state: State
    contents: Contents
    tensors: dict[str, torch.Tensor]
    durable: Callable[[Saved], None]
    make_way: Callable[[Path, Marker], None]
    started: float
    stall: float


class Saver:
    """Writes a run's checkpoints, one at a time. Every rank makes one and calls it at the same steps."""

    def __init__(
        self,
        recipe: Recipe,
        topology: Topology,
        optimizer: ShardedOptimizer,
        placed: Callable[[Path], Path] = lambda folder: folder,
    ) -> None:
        """`placed` is asked on rank 0, by the writing thread: where a folder is written now.

        It may raise CheckpointError and OSError.
        """
        self._recipe, self._topology, self._optimizer, self._placed = recipe, topology, optimizer, placed
        self._copy = HostCopy(optimizer, topology)
        self._channel = SideChannel(_SLOWEST_WRITE)
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None

    @property
    def optimizer_step(self) -> int:
        """AdamW updates done."""
        return self._optimizer.updates

    def save(
        self,
        folder: Path,
        state: State,
        contents: Contents,
        durable: Callable[[Saved], None],
        make_way: Callable[[Path, Marker], None] = lambda folder, marker: None,
    ) -> None:
        """Begin to write `folder`; waits first until the save before is durable.

        `durable` is called on rank 0, by the writing thread, once the marker is on disk; `make_way` before, see
        `write.finish`. Raises CheckpointError where the save before failed.
        """
        started = time.perf_counter()
        self.wait()
        self._optimizer.gather()  # a gather under way still writes to the flat weights
        tensors = self._copy.fill(stored_whats(contents, self._recipe.precision))
        stall = time.perf_counter() - started
        asked = _Save(state, contents, tensors, durable, make_way, started, stall)
        self._thread = threading.Thread(target=self._run, args=(folder, asked), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the save under way is durable. Raises CheckpointError where it failed."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Raises CheckpointError where the last save failed; waits for nothing."""
        if self._error is not None:
            raise self._error

    def _run(self, folder: Path, asked: _Save) -> None:
        # Linux keeps a priority for each thread: where cores are scarce, training goes first.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            self._write(folder, asked)
        except CheckpointError as error:
            self._error = error
        except BaseException as error:  # of a library's sys.exit too, which would end this thread alone, without a word
            if device.lost_peer(error):
                what, remedy = "a rank died during this save", "why is above, or in the launcher's last words"
            else:
                traceback.print_exc()
                what, remedy = f"{type(error).__name__}: {error}", "see the traceback"
            remedy += "; the run resumes from the newest good checkpoint"
            self._error = CheckpointError(folder, f"not written: {what}", remedy)
            self._error.__cause__ = error

    def _write(self, folder: Path, asked: _Save) -> None:
        """Again where the folder goes away meanwhile: what is saved is still in memory."""
        pauses = iter(_PAUSES)
        while True:
            place, problem = self._place(folder)
            if place is not None:
                problem, is_lost = self._write_at(Path(place), asked)
                if problem is None:
                    return
                if is_lost and (pause := next(pauses, None)) is not None:
                    time.sleep(pause)
                    continue
                if self._topology.rank == 0 and not is_lost:
                    shutil.rmtree(partial_folder(Path(place)), ignore_errors=True)
            what, remedy = problem
            raise CheckpointError(folder, what, f"{remedy}; the run resumes from the newest good checkpoint")

    def _place(self, folder: Path) -> Any:
        """Where a folder is written now, and None; or None, and why nowhere with the remedy. Alike on every rank."""
        place: str | None = None
        problem: list[str] | None = None
        if self._topology.rank == 0:
            try:
                place = str(self._placed(folder))
            except (CheckpointError, OSError) as error:
                problem = _told("not written", error)
        return self._channel.from_first([place, problem])

    def _write_at(self, folder: Path, asked: _Save) -> Any:
        """None once `folder` is durable; else what went wrong and the remedy. And whether what was written is gone.

        Alike on every rank.
        """
        rank, beside = self._topology.rank, partial_folder(folder)
        me = f"rank {rank} on {platform.node()}"
        mine: StoredFile | None = None
        problem: list[str] | None = None
        try:
            folder.parent.mkdir(exist_ok=True)  # but not a run's folder: whoever moved it may have another there now
            beside.mkdir(exist_ok=True)
            if asked.tensors:
                mine = write_file(beside / rank_file(rank), asked.tensors)
        except (CheckpointError, OSError) as error:
            problem = _told(f"not written: {me}", error)
        answers = self._channel.gather({"file": mine and mine.model_dump(), "problem": problem})
        problem = next((a["problem"] for a in answers if a["problem"]), None)
        if rank == 0 and problem is None:
            files = {rank_file(r): StoredFile(**a["file"]) for r, a in enumerate(answers) if a["file"]}
            try:
                index = Index(
                    contents=asked.contents,
                    state=asked.state,
                    recipe=self._recipe,
                    layout=f"{self._topology}, ZeRO-{self._recipe.parallel.zero_stage}",
                    environment=environment(),
                    tensors=index_tensors(beside, files, self._recipe, asked.contents),
                )
                marker = finish(beside, folder, files, index, asked.make_way)
            except (ValueError, OSError) as error:
                problem = _told(f"not written: {me}", error)
            else:
                size = sum(file.bytes for file in marker.files.values())
                seconds = time.perf_counter() - asked.started
                try:
                    asked.durable(Saved(folder, asked.state, asked.contents, marker.digest, size, asked.stall, seconds))
                except (ValueError, OSError) as error:
                    problem = _told(f"durable, but what follows a save failed: {me}", error)
        return self._channel.from_first([problem, not (beside.is_dir() or folder.is_dir())])


def _told(what: str, error: Exception) -> list[str]:
    """What went wrong and its remedy, apart: the message that they go into has a remedy of its own."""
    message, _, remedy = str(error).partition("\n  remedy: ")
    return [f"{what}: {message}", remedy or "see to the file system"]


def environment() -> dict[str, str]:
    """What wrote a checkpoint."""
    packages = ("torch", "megatron-core", "deepspeed", "safetensors")
    return {
        "python": platform.python_version(),
        "device": device.name(),
        **{name: metadata.version(name) for name in packages},
    }
