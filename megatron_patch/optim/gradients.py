"""Gradient accumulation and synchronisation, beside the optimizer that consumes it.

Every parameter accumulates into `main_grad`, an fp32 view of its group's flat buffer: linear layers inside their
weight-gradient GEMM (kernels/weight_gradient.py), the embedding by rows (kernels/embedding.py), the others through a
hook that adds and drops `grad`. Each buffer is summed over the data-parallel group straight into this rank's shard
(reduce-scatter), and the shard, 1/DP of the bytes, over the ranks that hold replicas of the group, as the group says of
itself (`Replication` in groups.py). In MobiLlama:

    parameters                       summed over                                 counted in the norm by
    embedding, attention, own FFNs   nobody else                                 every rank
    an FFN of several layers         the pipeline stages of those layers         the first of those stages
    norm weights                     tensor ranks, under sequence parallelism    tensor-parallel rank 0
    encoder and projector of images  tensor ranks, under sequence parallelism    tensor-parallel rank 0

An FFN has groups of its own because shard boundaries must align across stages that hold different other parameters:
only then is the sum over stages bit-equal on all of them. Replicated norms need their sum only under sequence
parallelism; otherwise every tensor-parallel rank computes the same gradient.

Parameters of one layer form buckets of neighbouring layers. A bucket's reduce-scatter starts during the backward pass
of the last micro-batch, as soon as the gradient that leaves its lowest layer is computed: then every use of its
weights, in every micro-batch and under any recomputation, has been added. A shared FFN's starts when it is through in
the lowest layer that uses it, before that layer's attention; the embedding's and the norms' at the end. What autograd
knows of a parameter does not serve here: it reports a shared weight once a micro-batch without recomputation, and once
a layer with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_patch.optim.groups import ParameterGroup
from megatron_patch.parallel import device
from megatron_patch.parallel.topology import Topology
from megatron_patch.recipe import Recipe


class GradientBuffer:
    """The fp32 gradients of one parameter group, flat, in the order of the optimizer's flat weights.

    `shard` [padded length / DP] holds this rank's part of the sum after `finish`.
    """

    def __init__(
        self,
        group: ParameterGroup[torch.nn.Parameter],
        flat_weights: torch.Tensor,
        recipe: Recipe,
        topology: Topology,
    ) -> None:
        """`flat_weights` is the flat tensor of which the group's parameters are views."""
        self._data_group = topology.data_group
        self.layers = group.layers
        self.parameters = {id(parameter) for parameter in group.parameters}
        self._passes_left = 0
        self._reduction: dist.Work | None = None
        replicas = group.replication
        self.counted = replicas.is_owner(topology.pipeline_rank, topology.tensor_rank)
        self._replicas: list[dist.ProcessGroup] = []
        if replicas.partial and topology.tensor_size > 1:
            self._replicas.append(topology.tensor_group)
        if replicas.over_stages:
            self._replicas.append(topology.stage_group(replicas.stages))
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

    def clear(self, micro_batches: int) -> None:
        """Make the buffer ready for the first of a step's micro-batches."""
        if self._release:
            self.flat.untyped_storage().resize_(self._bytes)
        self.flat.zero_()
        self._passes_left = len(self.layers) * micro_batches

    def layer_is_done(self) -> None:
        """One of `layers` has finished its backward pass of a micro-batch; the last such call starts the sum."""
        self._passes_left -= 1
        if self._passes_left == 0:
            self._start()

    def _start(self) -> None:
        if self.shard is not self.flat:
            self._reduction = dist.reduce_scatter_tensor(self.shard, self.flat, group=self._data_group, async_op=True)

    def start(self) -> None:
        """Start the sum over data-parallel ranks unless the backward pass did."""
        if self._reduction is None:
            self._start()

    def finish(self) -> None:
        """Wait for the sum over data-parallel ranks to reach `shard`, then sum that over replicas."""
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None
            if self._release:
                self.flat.untyped_storage().resize_(0)
        for group in self._replicas:
            dist.all_reduce(self.shard, group=group)


def reduce_during_backward(layers: Iterable[Any], buffers: Sequence[GradientBuffer]) -> None:
    """Tell the buffers of each decoder layer when its backward pass of a micro-batch is done.

    Buffers of a layer's FFN alone are notified when the FFN is through, before the layer's attention, a shared FFN's
    too: its hook runs once for each layer that uses it.
    """
    watched: dict[torch.nn.Module, list[GradientBuffer]] = {}
    for layer in layers:
        in_ffn = {id(parameter) for parameter in layer.mlp.parameters()}
        for buffer in buffers:
            if layer.layer_number - 1 in buffer.layers:
                module = layer.mlp if buffer.parameters <= in_ffn else layer
                concerned = watched.setdefault(module, [])
                if buffer not in concerned:
                    concerned.append(buffer)
    for module, concerned in watched.items():
        module.register_forward_pre_hook(_watch(concerned), with_kwargs=True)


def _watch(buffers: Sequence[GradientBuffer]) -> Any:
    def on_forward(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Under full recomputation the first forward pass has no gradients; the second, within backward, has.
        if torch.is_grad_enabled():
            hidden_states = args[0] if args else kwargs["hidden_states"]
            hidden_states.register_hook(on_backward)

    def on_backward(_: torch.Tensor) -> None:
        for buffer in buffers:
            buffer.layer_is_done()

    return on_forward


def _into_main_grad(parameter: torch.nn.Parameter) -> None:
    # A linear layer's weight arrives without a gradient: its GEMM has added to main_grad already. Where somebody has
    # given the weight `grad_added_to_main_grad`, mcore says the same with that and hands back uninitialised memory.
    if parameter.grad is not None:
        if not getattr(parameter, "grad_added_to_main_grad", False):
            parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
        parameter.grad = None


def local_norm_squared(buffers: Sequence[GradientBuffer]) -> torch.Tensor:
    """Sum of squares of the shards this rank counts; summed over all ranks it is the squared global gradient norm."""
    squares = [buffer.shard.square().sum() for buffer in buffers if buffer.counted]
    return torch.stack(squares).sum() if squares else torch.zeros((), device=device.current())
