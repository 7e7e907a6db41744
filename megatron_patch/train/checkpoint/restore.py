"""Fill the model and the optimizer of any layout from a checkpoint of any layout."""

from __future__ import annotations

import torch

from megatron_patch.optim.zero import ShardedOptimizer
from megatron_patch.parallel.topology import Topology
from megatron_patch.train.checkpoint.format import What
from megatron_patch.train.checkpoint.plan import local_ranges
from megatron_patch.train.checkpoint.reader import Checkpoint
from megatron_patch.vision.clip_folder import ClipFolder
from megatron_patch.vision.shapes import ENCODER


@torch.no_grad()
def restore(
    checkpoint: Checkpoint, optimizer: ShardedOptimizer, topology: Topology, *, weights_alone: bool = False
) -> None:
    """Set weights, master weights and moments; bit-identical to what was saved, in whatever layout.

    With `weights_alone` the moments stay as they are before the first step, and so do tensors that the checkpoint has
    not, as those of an encoder in a decoder's.

    Each rank reads what its ZeRO shard holds; weights are the rounded master weights, as after every step, gathered
    over the data-parallel group. Every rank must call it. Raises CheckpointError where the optimizer is not stored.
    """
    for i in range(len(optimizer.groups)):
        master = optimizer.master_shards[i]
        targets: dict[What, torch.Tensor] = {"master" if checkpoint.is_full else "weight": master}
        if not (weights_alone or optimizer.groups[i].frozen):
            moments = optimizer.moments(i)
            moments["step"] = torch.tensor(float(checkpoint.state.optimizer_step), device=master.device)
            moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(master), torch.zeros_like(master)
            targets |= {"exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
        for piece in local_ranges(optimizer, i, topology.data_rank):
            if weights_alone and piece.whole.name not in checkpoint.index.tensors:
                continue
            for what, target in targets.items():
                values = checkpoint.range_of_part(
                    piece.whole.name, topology.tensor_rank, topology.tensor_size, piece.start, piece.stop, what
                )
                target[piece.low : piece.high].copy_(values)
        optimizer.publish(i)


@torch.no_grad()
def set_encoder(folder: ClipFolder, optimizer: ShardedOptimizer, topology: Topology) -> None:
    """Set the encoder's weights to those of a Hugging Face folder. Every rank must call it."""
    for i, group in enumerate(optimizer.groups):
        if group.wholes[0].of != "encoder":
            continue
        for piece in local_ranges(optimizer, i, topology.data_rank):
            values = folder.tensor(piece.whole.name.removeprefix(f"{ENCODER}.")).reshape(-1)[piece.start : piece.stop]
            optimizer.master_shards[i][piece.low : piece.high].copy_(values)
        optimizer.publish(i)
