"""DeepSpeed ZeRO holds the optimizer state: fp32 master weights and both AdamW moments, 1/DP of them on each rank.

DeepSpeed's own gradient hooks fire once per use of a shared weight and average over ranks, so gradients go their own
way (gradients.py). DeepSpeed's own step is not called either: it runs AdamW on every group before it gathers the first
one, all at once and before it returns, and whether a step is withheld it would have to know on the host. What it holds
is updated here, group by group, and gathered under the next forward pass (weights.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch

from megatron_patch.model.parameters import local_parameters
from megatron_patch.optim.gradients import GradientBuffer, local_norm_squared, reduce_during_backward
from megatron_patch.optim.groups import forward_order, parameter_groups, replicated_stages
from megatron_patch.optim.weights import FlatWeights, gather_before_use
from megatron_patch.parallel import device
from megatron_patch.parallel.topology import Mpu, Topology, make_stage_groups
from megatron_patch.recipe import Recipe

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# DeepSpeed would compile a shared-memory all-reduce for CPUs at start-up wherever it finds a compiler; ours is gloo's.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def deepspeed_config(recipe: Recipe, micro_batches: int) -> dict[str, Any]:
    """DeepSpeed's configuration, generated from the recipe and written nowhere else."""
    return {
        "train_micro_batch_size_per_gpu": recipe.batch.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": {
            "stage": recipe.parallel.zero_stage,
            # The norm counts the shared FFN and the norms once (gradients.py); DeepSpeed would count per parameter.
            "compute_grad_norm": False,
            "contiguous_gradients": False,
            "overlap_comm": False,
            "round_robin_gradients": False,
        },
        "gradient_clipping": 0.0,
        "bf16": {"enabled": recipe.precision == "bf16", "check_grad_overflow": False},
        # DeepSpeed accumulates nothing; equal dtypes keep it from allocating a second set of fp32 gradients.
        "data_types": {"grad_accum_dtype": recipe.precision},
        "zero_allow_untested_optimizer": True,
    }


class ShardedOptimizer:
    """AdamW under DeepSpeed ZeRO-1 or ZeRO-2, with fp32 gradients of our own.

    A step is: `clear_gradients`, forward and backward of every micro-batch, `reduce_gradients`,
    `local_norm_squared` (to be summed over all ranks), `step`. After it the model can run at once, as each layer waits
    for its weights; who reads them in another way calls `gather` first.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], recipe: Recipe, topology: Topology, micro_batches: int
    ) -> None:
        """`micro_batches` is the number whose gradients this rank sums in a step."""
        o = recipe.optimizer
        self.micro_batches = micro_batches
        self._topology = topology
        self.groups = parameter_groups(list(local_parameters(chunks, recipe.model)), recipe, topology.pipeline_rank)
        make_stage_groups(replicated_stages(recipe), recipe.parallel, topology.timeout)
        adamw = torch.optim.AdamW(
            [{"params": g.parameters, "weight_decay": o.weight_decay if g.decays else 0.0} for g in self.groups],
            lr=0.0,
            betas=(o.beta1, o.beta2),
            eps=o.epsilon,
            fused=True,
        )
        engine, *_ = deepspeed.initialize(
            # DeepSpeed would take the GPU with the number of LOCAL_RANK; device.py has chosen already.
            args=SimpleNamespace(device_rank=device.current().index or 0),
            model=torch.nn.ModuleList(chunks),
            optimizer=adamw,
            mpu=Mpu,
            config=deepspeed_config(recipe, micro_batches),
            dist_init_required=False,
        )
        self._zero = engine.optimizer
        for hook in self._zero._grad_acc_hooks:
            hook.remove()
        self._buffers = {
            i: GradientBuffer(group, flat, recipe, topology)
            for i, (group, flat) in enumerate(zip(self.groups, self.flat_weights, strict=True))
            if not group.frozen
        }
        for parameter in (p for group in self.groups if group.frozen for p in group.parameters):
            parameter.requires_grad_(False)  # not before: DeepSpeed leaves those out that need no gradient
        self._weights = [FlatWeights(flat, topology) for flat in self.flat_weights]
        self._forward_order = forward_order(self.groups)
        if topology.data_size > 1:
            of_parameter = {id(p): w for g, w in zip(self.groups, self._weights, strict=True) for p in g.parameters}
            gather_before_use(chunks, of_parameter)
            reduce_during_backward((layer for chunk in chunks for layer in chunk.decoder.layers), self.buffers)  # type: ignore[union-attr]

    @property
    def buffers(self) -> list[GradientBuffer]:
        """Gradients of the groups that are trained, in their order."""
        return list(self._buffers.values())

    @property
    def flat_weights(self) -> list[torch.Tensor]:
        """The whole weights of each group, flat [padded length], of which its parameters are views."""
        return [flat.detach() for flat in self._zero.bit16_groups_flat]

    @property
    def master_shards(self) -> list[torch.Tensor]:
        """This rank's part of each group's fp32 master weights, flat [padded length / DP]."""
        return [master.detach() for master in self._masters]

    def weight_shard(self, group: int) -> torch.Tensor:
        """This rank's part of a group's weights, flat [padded length / DP]."""
        return self.flat_weights[group].chunk(self._topology.data_size)[self._topology.data_rank]

    def moments(self, group: int) -> dict[str, torch.Tensor]:
        """AdamW's state of this rank's shard: exp_avg, exp_avg_sq (like the shard) and step (scalar).

        Empty before the first update, and of a frozen group; what is put into it is AdamW's from then on.
        """
        return self._zero.optimizer.state[self._masters[group]]

    def offsets(self, group: int) -> list[int]:
        """Where each of a group's parameters begins in its flat weights."""
        start = self._zero.bit16_groups_flat[group].storage_offset()
        return [parameter.storage_offset() - start for parameter in self.groups[group].parameters]

    @property
    def updates(self) -> int:
        """AdamW updates done; 0 on a rank whose parts are all frozen, which the first rank's never are."""
        moments = self.moments(min(self._buffers, default=0))
        return int(moments["step"].item()) if moments else 0

    @torch.no_grad()
    def publish(self, group: int) -> None:
        """Round the master weights of a group into its weights, on all data-parallel ranks; every rank calls it."""
        self._weights[group].publish(self._masters[group])
        self._weights[group].wait()

    @property
    def _masters(self) -> list[torch.Tensor]:
        return self._zero.single_partition_of_fp32_groups

    def clear_gradients(self) -> None:
        for buffer in self.buffers:
            buffer.clear(self.micro_batches)

    def reduce_gradients(self) -> None:
        """Sum gradients over data-parallel ranks and replicas, what backward has started included.

        Every rank must call it once a step.
        """
        for buffer in self.buffers:
            buffer.start()
        for buffer in self.buffers:
            buffer.finish()

    def local_norm_squared(self) -> torch.Tensor:
        return local_norm_squared(self.buffers)

    @torch.no_grad()
    def step(self, learning_rate: float, scale: torch.Tensor, withheld: torch.Tensor) -> None:
        """Update the weights from the reduced gradients times `scale` (the clip coefficient, a scalar tensor).

        Where `withheld` (fp32 scalar tensor) is 1, weights, moments and their step count stay as they are; it is read
        on the device. Groups are updated and gathered in the order in which the next forward pass uses them.
        """
        adamw = self._zero.optimizer
        param_groups = adamw.param_groups
        adamw.found_inf = withheld  # as torch's gradient scaler tells it
        for i in self._forward_order:
            if i not in self._buffers:
                continue
            master = self._masters[i]
            master.grad = self._buffers[i].shard.mul_(scale)
            param_groups[i]["lr"] = learning_rate * self.groups[i].multiple
            adamw.param_groups = [param_groups[i]]
            adamw.step()
            master.grad = None
            self._weights[i].publish(master)
        adamw.param_groups = param_groups

    def gather(self) -> None:
        """Wait until the weights that `step` began to gather are whole on this rank."""
        for weights in self._weights:
            weights.wait()
