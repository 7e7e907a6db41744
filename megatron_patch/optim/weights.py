"""The model's weights, gathered from the ranks' shards bucket by bucket while the next forward pass already runs.

After AdamW each data-parallel rank holds the new weights of its shards. Each group's all-gather starts as soon as its
own shard is updated, in the order of the forward pass, and what first uses a group waits for that group alone: under
the gathers run the updates of later groups and the layers before. On a GPU to wait means that the stream waits; the
host does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_patch.parallel.topology import Topology


class FlatWeights:
    """The weights of one parameter group, flat; the group's parameters are views of it."""

    def __init__(self, flat: torch.Tensor, topology: Topology) -> None:
        """`flat` [padded length], of which this rank's ZeRO shard is the `data_rank`-th part of `data_size`."""
        self._flat = flat.detach()
        self._own = self._flat.chunk(topology.data_size)[topology.data_rank]
        self._group = topology.data_group if topology.data_size > 1 else None
        self._gather: dist.Work | None = None

    def publish(self, master: torch.Tensor) -> None:
        """Round this rank's fp32 master weights into its part, and start to gather the other ranks' parts."""
        self._own.copy_(master)
        if self._group is not None:
            self._gather = dist.all_gather_into_tensor(self._flat, self._own, group=self._group, async_op=True)

    def wait(self) -> None:
        """Until all parts are there."""
        if self._gather is not None:
            self._gather.wait()
            self._gather = None


def gather_before_use(chunks: Sequence[torch.nn.Module], weights: Mapping[int, FlatWeights]) -> None:
    """Let embedding, encoder, each decoder layer, FFN and output layer wait for its weights, by parameter's id."""
    for chunk in chunks:
        for module, users in _users(chunk):
            concerned = {id(w): w for user in users for p in user.parameters() if (w := weights.get(id(p)))}
            module.register_forward_pre_hook(_waits_for(list(concerned.values())))


def _users(chunk: Any) -> Iterable[tuple[torch.nn.Module, list[torch.nn.Module]]]:
    """(module before whose forward pass to wait, modules whose weights it or what follows it uses) of a model chunk."""
    ffns: list[torch.nn.Module] = []
    if chunk.pre_process:
        yield chunk.embedding, [chunk.embedding]
    if chunk.vision is not None:
        yield chunk.vision, [chunk.vision]
    for layer in chunk.decoder.layers:
        # The FFN is awaited by itself: a shared one, whose bucket is not the attention's, under layer 0's attention.
        yield layer, [module for name, module in layer.named_children() if name != "mlp"]
        if layer.mlp not in ffns:
            ffns.append(layer.mlp)
            yield layer.mlp, [layer.mlp]
    if chunk.post_process:
        # The loss takes the output layer's weight without calling the layer (kernels/loss.py).
        yield chunk.decoder.final_layernorm, [chunk.decoder.final_layernorm, chunk.output_layer]


def _waits_for(weights: list[FlatWeights]) -> Any:
    def on_forward(*_: Any) -> None:
        for w in weights:
            w.wait()

    return on_forward
