"""Which parameters of a rank are reduced, counted and decayed alike, and at once: gradients.py says how and why.

Nothing here imports torch, so that `plan` counts the same groups at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

from megatron_patch.model.parameters import Whole


class Sized(Protocol):
    """A parameter, or what stands for one."""

    def numel(self) -> int: ...


P = TypeVar("P", bound=Sized)
Replication = Literal["sharded", "ffn", "norm"]


@dataclass
class ParameterGroup(Generic[P]):
    """Parameters that are reduced, counted and decayed alike, and reduced at once."""

    replication: Replication
    decays: bool
    wholes: list[Whole] = field(default_factory=list)
    parameters: list[P] = field(default_factory=list)
    layers: set[int] = field(default_factory=set)
    """Layers of this rank (from 0) after whose backward passes the gradients are whole; none: only at the end."""

    @property
    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)


def parameter_groups(
    parameters: Sequence[tuple[Whole, P]], decay_everything: bool, bucket: int
) -> list[ParameterGroup[P]]:
    """Split a rank's parameters; groups without parameters are left out.

    Sharded ones are gathered in the order in which backward meets them, output layer first, until a group holds
    `bucket` parameters; a layer is never divided. 0 puts them all into one, which is reduced at the end.
    """
    groups: list[ParameterGroup[P]] = []
    local_layers = {layer for whole, _ in parameters if (layer := whole.layer) is not None}
    for whole, parameter in sorted(parameters, key=lambda p: _backward_order(p[0])):
        replication: Replication = whole.kind if whole.kind in ("ffn", "norm") else "sharded"
        decays = decay_everything or whole.kind in ("matrix", "ffn")
        group = next((g for g in reversed(groups) if (g.replication, g.decays) == (replication, decays)), None)
        if group is None or (bucket and replication == "sharded" and not _joins(whole, group, bucket)):
            group = ParameterGroup(replication, decays)
            groups.append(group)
        group.wholes.append(whole)
        group.parameters.append(parameter)
        if bucket:
            group.layers |= _layers_before_reduction(whole, local_layers)
    return groups


def forward_order(groups: Sequence[ParameterGroup[P]]) -> list[int]:
    """Places in `groups`, a rank's, in the order in which a forward pass first waits for their weights."""
    lowest = min((whole.layer for group in groups for whole in group.wholes if whole.layer is not None), default=0)
    return sorted(range(len(groups)), key=lambda i: min(_first_use(whole, lowest) for whole in groups[i].wholes))


def _first_use(whole: Whole, lowest: int) -> float:
    """The layer that first uses it, from -1 for what stands before them all; `lowest` is the rank's first."""
    if whole.kind in ("norm", "embedding"):
        return -1.0
    if whole.kind == "ffn":
        return lowest + 0.5  # a shared one: after the attention of that layer
    return math.inf if whole.layer is None else whole.layer


def _backward_order(whole: Whole) -> tuple[int, int]:
    if whole.layer is not None:
        return 1, -whole.layer
    return {"ffn": 2, "embedding": 3}.get(whole.kind, 0), 0


def _joins(whole: Whole, group: ParameterGroup[P], bucket: int) -> bool:
    same_layer = whole.layer is not None and whole.layer in group.layers
    return whole.kind != "embedding" and (same_layer or group.size < bucket)


def _layers_before_reduction(whole: Whole, local_layers: set[int]) -> set[int]:
    """Layers whose backward passes of a step must be over before this gradient may be reduced; none: not before all."""
    if whole.kind in ("embedding", "norm"):
        return set()  # autograd adds these after the layer's hook; both come at the end
    if whole.kind == "ffn":
        return local_layers
    # The output layer's gradient is whole before backward reaches any layer (kernels/loss.py).
    return {max(local_layers) if whole.layer is None else whole.layer}
