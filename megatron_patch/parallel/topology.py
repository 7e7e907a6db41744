"""Process groups of one job, and the mpu object through which DeepSpeed reads them.

Megatron-Core owns the groups. Ranks are laid out tensor-parallel first, then data-parallel, then pipeline, so that a
tensor group stays inside a node.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core import tensor_parallel

from megatron_patch.launch import LaunchError, check_threads
from megatron_patch.parallel import device, patches
from megatron_patch.recipe import Parallel, RecipeError

TIMEOUT = timedelta(minutes=10)
"""The default of a collective."""
_THREADS = 64  # of all groups: gloo starts three for each, and each rank is in some 20


@dataclass(frozen=True)
class Topology:
    """Where this rank stands. Sizes and ranks are counts; groups are torch process groups."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    virtual_pipeline_size: int
    data_rank: int
    data_size: int
    timeout: timedelta = TIMEOUT  # of a collective

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        return ps.get_tensor_model_parallel_group()

    @property
    def data_group(self) -> dist.ProcessGroup:
        return ps.get_data_parallel_group()

    def stage_group(self, stages: tuple[int, ...]) -> dist.ProcessGroup:
        """This rank and those with its tensor and data rank on the other `stages` (`make_stage_groups` made it)."""
        return _stage_groups[stages]

    def __str__(self) -> str:
        virtual = f"xVPP{self.virtual_pipeline_size}" if self.virtual_pipeline_size > 1 else ""
        return f"TP{self.tensor_size} x PP{self.pipeline_size}{virtual} x DP{self.data_size}"


_stage_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


def make_stage_groups(wanted: Iterable[tuple[int, ...]], parallel: Parallel, timeout: timedelta) -> None:
    """Make the groups over which replicas on some pipeline stages are summed, in place of earlier ones.

    Every rank calls it with the same stages in the same order, whether it stands on them or not.
    """
    _stage_groups.clear()
    data = data_parallel_size(parallel, dist.get_world_size())
    pipelines = ps.RankGenerator(
        tp=parallel.tensor, ep=1, dp=data, pp=parallel.pipeline, cp=1, order="tp-cp-ep-dp-pp"
    ).get_ranks("pp")
    for stages in wanted:
        if stages == tuple(range(parallel.pipeline)):
            _stage_groups[stages] = ps.get_pipeline_model_parallel_group()
            continue
        ranks = [[pipeline[stage] for stage in stages] for pipeline in pipelines]
        name = "_".join(("PIPELINE_STAGES", *map(str, stages)))  # the flight recorder's, like Megatron's names
        mine, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout, group_desc=name)
        if mine is not None:
            _stage_groups[stages] = mine


def data_parallel_size(parallel: Parallel, world_size: int) -> int:
    """Ranks left for data parallelism; RecipeError where the model does not divide the world."""
    model_ranks = parallel.tensor * parallel.pipeline
    if world_size % model_ranks:
        raise RecipeError(
            f"{world_size} ranks / (parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline}) = "
            f"{world_size / model_ranks:g}: start a multiple of {model_ranks} ranks, or change the layout"
        )
    return world_size // model_ranks


def join(
    parallel: Parallel,
    timeout: timedelta = TIMEOUT,
    asked: Callable[[], str | None] = lambda: None,
) -> None:
    """Join the process group, unless that was done.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun sets them. `timeout` is that of a
    collective; `asked` is called while ranks wait for each other and may end it with a reason.
    Raises RecipeError where the layout does not divide the world, LaunchError where the group cannot be made, WaitEnded
    where `asked` ended the wait.
    """
    data_parallel_size(parallel, dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"]))
    if parallel.tensor > 1:
        # mcore queues a collective before the GEMM that it is to run beside and counts on their starting in that order.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device.use(int(os.environ.get("LOCAL_RANK", "0")))
    patches.apply()
    if not dist.is_initialized():
        check_threads(_THREADS)
        with _named():
            device.init_process_group(timeout, asked=asked)


def initialize(parallel: Parallel, timeout: timedelta = TIMEOUT) -> Topology:
    """Join, and build Megatron's groups, in place of earlier ones. Raises as `join` does."""
    join(parallel, timeout)
    if ps.model_parallel_is_initialized():
        ps.destroy_model_parallel()
    with _named():
        ps.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            distributed_timeout_minutes=math.ceil(timeout / timedelta(minutes=1)),
            create_gloo_process_groups=False,  # for checkpoints of mcore; ours has a group of its own
        )
    # mcore forks a named random state around embedding and recompute. Nothing here draws from it: no dropout.
    tensor_parallel.model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    return Topology(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=ps.get_tensor_model_parallel_rank(),
        tensor_size=parallel.tensor,
        pipeline_rank=ps.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel.pipeline,
        virtual_pipeline_size=parallel.virtual_pipeline,
        data_rank=ps.get_data_parallel_rank(),
        data_size=ps.get_data_parallel_world_size(),
        timeout=timeout,
    )


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Turns what keeps process groups from being made into a LaunchError."""
    try:
        yield
    except RuntimeError as error:
        if device.lost_peer(error):
            raise
        raise LaunchError(
            f"process groups cannot be made on {platform.node()}: {error}; they need a network interface (`ip link`) "
            "and an open file for each pair of ranks (`ulimit -n`)"
        ) from error


def destroy() -> None:
    """Leave every group."""
    ps.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


class Mpu:
    """The accessors DeepSpeed calls on its `mpu` argument. Model parallel means tensor x pipeline."""

    get_data_parallel_group = staticmethod(ps.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(ps.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(ps.get_data_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(ps.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(ps.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(ps.get_tensor_model_parallel_world_size)
    get_pipeline_model_parallel_group = staticmethod(ps.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_rank = staticmethod(ps.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(ps.get_pipeline_model_parallel_world_size)

    @staticmethod
    def get_model_parallel_group() -> dist.ProcessGroup:
        return ps.get_model_parallel_group()

    @staticmethod
    def get_model_parallel_rank() -> int:
        return torch.distributed.get_rank(ps.get_model_parallel_group())

    @staticmethod
    def get_model_parallel_world_size() -> int:
        return torch.distributed.get_world_size(ps.get_model_parallel_group())
