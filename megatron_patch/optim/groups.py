"""Which parameters of a rank are reduced, counted, decayed and written alike, and at once.

A group says of itself over which ranks it is replicated, whether a rank's gradient is a part of the sum or the whole,
and which rank counts it in the norm and writes it (`Replication`). Gradients, norm, checkpoints, memory and traffic
read that; nobody asks what a parameter is for. Nothing here imports torch, so that `plan` counts the same groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from megatron_patch.model.parameters import Whole, stage_layers, stages_of, whole_tensors
from megatron_patch.recipe import Recipe


class Sized(Protocol):
    """A parameter, or what stands for one."""

    def numel(self) -> int: ...


P = TypeVar("P", bound=Sized)


@dataclass(frozen=True)
class Replication:
    """Who holds the same parameter. Among data-parallel ranks every parameter is a replica, and sharded by ZeRO.

    Attributes:
        stages: the pipeline stages that hold it, first one first. Of several, each has a part of its gradient.
        over_tensor: every tensor-parallel rank of a stage holds it whole; else each holds a part of its own.
        partial: where `over_tensor`, a rank's gradient is a part of the sum over the tensor group; else it is the
            whole, the same on every rank.
    """

    stages: tuple[int, ...]
    over_tensor: bool
    partial: bool

    @property
    def over_stages(self) -> bool:
        """Whether gradients are summed over pipeline stages."""
        return len(self.stages) > 1

    def is_owner(self, stage: int, tensor_rank: int) -> bool:
        """Whether this rank's copy is the one that counts in the global norm and is written to checkpoints."""
        return stage == self.stages[0] and (tensor_rank == 0 or not self.over_tensor)


def replication(whole: Whole, recipe: Recipe) -> Replication:
    """Where a tensor's replicas are in the recipe's layout.

    A tensor that tensor parallelism does not cut sees all tokens on every rank, and its gradient is whole there, unless
    sequence parallelism splits the tokens, or it works on the rank's own heads (`Whole.of_heads`).
    """
    over_tensor = whole.cut is None
    return Replication(
        stages=stages_of(whole, recipe),
        over_tensor=over_tensor,
        partial=over_tensor and (recipe.parallel.sequence or whole.of_heads),
    )


def replicated_stages(recipe: Recipe) -> list[tuple[int, ...]]:
    """The sets of pipeline stages over which some tensor is replicated, in one order on every rank."""
    found = (replication(whole, recipe).stages for whole in whole_tensors(recipe.model).values())
    return list(dict.fromkeys(stages for stages in found if len(stages) > 1))


@dataclass
class ParameterGroup(Generic[P]):
    """Parameters that are reduced, counted and decayed alike, and reduced at once."""

    replication: Replication
    decays: bool
    multiple: float
    """Of the schedule's learning rate; 0: it is frozen."""
    wholes: list[Whole] = field(default_factory=list)
    parameters: list[P] = field(default_factory=list)
    layers: set[int] = field(default_factory=set)
    """Layers of this rank (from 0) after whose backward passes the gradients are whole; none: only at the end."""

    @property
    def frozen(self) -> bool:
        """Whether it stays as it is: no gradient is computed, no moments are held."""
        return self.multiple == 0

    @property
    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def in_ffn(self) -> bool:
        """Whether all of it is FFNs': gradients whole before a layer's attention in backward, weights used after it."""
        return all(whole.kind == "ffn" for whole in self.wholes)


def parameter_groups(parameters: Sequence[tuple[Whole, P]], recipe: Recipe, stage: int) -> list[ParameterGroup[P]]:
    """Split the parameters of a rank on a pipeline stage; groups without parameters are left out.

    A tensor that several layers use is in a group with those alone that the same layers use: shard boundaries align
    across stages only where the groups hold the same. Of the rest, neighbouring layers are gathered in the order in
    which backward meets them, output layer first, until a group holds `parallel.reduce_bucket` parameters; a layer is
    never divided. A bucket of 0 puts them all into one, which is reduced at the end.
    """
    bucket = recipe.parallel.reduce_bucket
    local_layers = set(stage_layers(recipe)[stage])
    groups: list[ParameterGroup[P]] = []
    open_groups: dict[object, ParameterGroup[P]] = {}
    for whole, parameter in sorted(parameters, key=lambda p: _backward_order(p[0])):
        replicas = replication(whole, recipe)
        decays = recipe.optimizer.decay_everything or (whole.kind not in ("embedding", "norm") and len(whole.shape) > 1)
        key = (replicas, decays, whole.of, whole.layers if whole.shared else None)
        group = open_groups.get(key)
        if group is None or (bucket and _begins_bucket(whole, replicas, group, bucket)):
            group = open_groups[key] = ParameterGroup(replicas, decays, recipe.optimizer.multiple(whole.of))
            groups.append(group)
        group.wholes.append(whole)
        group.parameters.append(parameter)
        if bucket:
            group.layers |= _layers_before_reduction(whole, local_layers)
    return groups


def _backward_order(whole: Whole) -> tuple[int, int]:
    """Equal on every stage for what stages share, so that they sum it in one order."""
    if whole.shared:
        return 2, -whole.layers[-1]
    if whole.layers:
        return 1, -whole.layers[0]
    return {"projector": 3, "embedding": 4, "encoder": 5}.get(whole.kind, 0), 0


def forward_order(groups: Sequence[ParameterGroup[P]]) -> list[int]:
    """Places in `groups`, a rank's, in the order in which a forward pass first waits for their weights."""
    own = [whole.layers[0] for group in groups for whole in group.wholes if len(whole.layers) == 1]
    lowest = min(own, default=0)
    return sorted(range(len(groups)), key=lambda i: min(_first_use(whole, lowest) for whole in groups[i].wholes))


def _first_use(whole: Whole, lowest: int) -> float:
    """The layer that first uses it, from -1 for what stands before them all; `lowest` is the rank's first."""
    if whole.kind in ("norm", "embedding", "encoder", "projector"):
        return -1.0
    if whole.shared:  # an FFN: after the attention of that layer
        return min(layer for layer in whole.layers if layer >= lowest) + 0.5
    return whole.layers[0] if whole.layers else math.inf


def _begins_bucket(whole: Whole, replicas: Replication, group: ParameterGroup[P], bucket: int) -> bool:
    """Whether a tensor is reduced apart from those before it.

    Norms are small and wait for the end, all in one; so do encoder and projector, each in one.
    """
    if whole.shared or whole.cut is None:
        return False
    same_layer = bool(whole.layers) and whole.layers[0] in group.layers
    return whole.kind == "embedding" or not (same_layer or group.size < bucket)


def _layers_before_reduction(whole: Whole, local_layers: set[int]) -> set[int]:
    """Layers whose backward passes of a step must be over before this gradient may be reduced; none: not before all."""
    if whole.kind in ("embedding", "norm", "encoder", "projector"):
        return set()  # autograd adds these after the layers' hooks; all come at the end
    # The output layer's gradient is whole before backward reaches any layer (kernels/loss.py).
    return local_layers & set(whole.layers) if whole.layers else {max(local_layers)}
