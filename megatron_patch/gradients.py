"""Gradient accumulation and synchronisation, beside the optimizer that consumes it.

Every parameter accumulates into `main_grad`, an fp32 view of its group's flat buffer: linear layers inside their
weight-gradient GEMM (kernels/weight_gradient.py), the others through a hook that adds and drops `grad`. After the last
micro-batch each buffer is summed over the data-parallel group straight into this rank's shard (reduce-scatter), and
the shard, 1/DP of the bytes, over the ranks that hold replicas of the group:

    group     parameters                       replicas of it                  counted in the norm by
    sharded   embedding, attention, own FFNs   none                            every rank
    ffn       the shared FFN                   the other pipeline stages       the first stage
    norm      norm weights                     the tensor-parallel ranks       tensor-parallel rank 0

The FFN has groups of its own because shard boundaries must align across stages that hold different other parameters:
only then is the sum over stages bit-equal on all of them. Replicated norms need their sum only under sequence
parallelism; otherwise every tensor-parallel rank computes the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

from megatron_patch.model.parameters import Whole
from megatron_patch.recipe import Recipe
from megatron_patch.topology import Topology

Replication = Literal["sharded", "ffn", "norm"]


@dataclass
class ParameterGroup:
    """Parameters that are reduced, counted and decayed alike."""

    replication: Replication
    decays: bool
    wholes: list[Whole] = field(default_factory=list)
    parameters: list[torch.nn.Parameter] = field(default_factory=list)


def parameter_groups(
    parameters: Sequence[tuple[Whole, torch.nn.Parameter]], decay_everything: bool
) -> list[ParameterGroup]:
    """Split a rank's parameters; groups without parameters are left out."""
    groups: dict[tuple[Replication, bool], ParameterGroup] = {}
    for whole, parameter in parameters:
        replication: Replication = whole.kind if whole.kind in ("ffn", "norm") else "sharded"
        decays = decay_everything or whole.kind in ("matrix", "ffn")
        group = groups.setdefault((replication, decays), ParameterGroup(replication, decays))
        group.wholes.append(whole)
        group.parameters.append(parameter)
    return list(groups.values())


class GradientBuffer:
    """The fp32 gradients of one parameter group, flat, in the order of the optimizer's flat weights.

    `shard` [padded length / DP] holds this rank's part of the sum after `reduce`.
    """

    def __init__(self, group: ParameterGroup, flat_weights: torch.Tensor, recipe: Recipe, topology: Topology) -> None:
        """`flat_weights` is the flat tensor of which the group's parameters are views."""
        self._data_group = topology.data_group
        self._replicas: dist.ProcessGroup | None = None
        self.counted = True
        if group.replication == "ffn" and topology.pipeline_size > 1:
            self._replicas = topology.pipeline_group
            self.counted = topology.pipeline_rank == 0
        elif group.replication == "norm":
            self._replicas = topology.tensor_group if recipe.parallel.sequence else None
            self.counted = topology.tensor_rank == 0
        self.flat = torch.zeros(flat_weights.numel(), dtype=torch.float32, device=flat_weights.device)
        self._bytes = self.flat.untyped_storage().nbytes()
        sharded = topology.data_size > 1
        self.shard = self.flat.new_zeros(self.flat.numel() // topology.data_size) if sharded else self.flat
        # ZeRO-2: once the shard holds the sum, the whole is given back until the next step's first micro-batch.
        self._release = recipe.parallel.zero_stage == 2 and sharded
        for parameter in group.parameters:
            start = parameter.storage_offset() - flat_weights.storage_offset()
            parameter.main_grad = self.flat[start : start + parameter.numel()].view(parameter.shape)  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(_into_main_grad)

    def clear(self) -> None:
        """Make the buffer ready for the first micro-batch of a step."""
        if self._release:
            self.flat.untyped_storage().resize_(self._bytes)
        self.flat.zero_()

    def reduce(self) -> None:
        """Sum over data-parallel ranks into `shard`, then over replicas."""
        if self.shard is not self.flat:
            dist.reduce_scatter_tensor(self.shard, self.flat, group=self._data_group)
            if self._release:
                self.flat.untyped_storage().resize_(0)
        if self._replicas is not None:
            dist.all_reduce(self.shard, group=self._replicas)


def _into_main_grad(parameter: torch.nn.Parameter) -> None:
    # A linear layer's weight arrives without a gradient: its GEMM has added to main_grad already.
    if parameter.grad is not None:
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None


def local_norm_squared(buffers: Sequence[GradientBuffer]) -> torch.Tensor:
    """Sum of squares of the shards this rank counts; summed over all ranks it is the squared global gradient norm."""
    squares = [buffer.shard.square().sum() for buffer in buffers if buffer.counted]
    return torch.stack(squares).sum() if squares else buffers[0].shard.new_zeros(())
