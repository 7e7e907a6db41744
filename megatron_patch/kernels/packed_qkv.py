"""How query, key and value lie in one packed projection: by head, as Megatron lays them.

q, k and v of head 0, of head 1, ..., `head_dim` rows (of the weight) or columns (of its output) each. Parameters,
names, rotary embedding and its kernel read the layout here. Needs no torch, which `plan` does not wait for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PARTS = 3  # q, k, v, in this order


def packed_rows(heads: int, head_dim: int) -> int:
    """Rows of the packed weight."""
    return heads * PARTS * head_dim


def by_head(packed: torch.Tensor, heads: int) -> torch.Tensor:
    """View of an output [..., heads * 3d] as [..., heads, 3, d]."""
    return packed.view(*packed.shape[:-1], heads, PARTS, -1)


def part_of_weight(weight: torch.Tensor, part: int, heads: int) -> torch.Tensor:
    """View of q (0), k (1) or v (2) of a packed weight [heads * 3d, h] as [heads, d, h]."""
    return weight.view(heads, PARTS, -1, weight.shape[-1])[:, part]


def pack_weights(parts: Sequence[torch.Tensor], heads: int) -> torch.Tensor:
    """The packed weight [heads * 3d, h] of q, k and v [heads * d, h]."""
    rows, width = parts[0].shape
    packed = parts[0].new_empty(PARTS * rows, width)
    for i, part in enumerate(parts):
        part_of_weight(packed, i, heads).copy_(part.view(heads, -1, width))
    return packed
