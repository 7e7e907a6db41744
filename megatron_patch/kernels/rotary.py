"""Rotary embedding (Su et al. 2021, arXiv 2104.09864) fused with the split of the packed QKV projection.

`packed_qkv.py` says how heads lie in the packed projection. Dimension i turns with dimension i + d/2 (the "half"
pairing of LLaMA), by the angle position x base^(-2i/d).
"""

from __future__ import annotations

import torch

from megatron_patch.kernels import registry
from megatron_patch.kernels.packed_qkv import by_head

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def split_and_rotate(packed: torch.Tensor, table: torch.Tensor, heads: int) -> Heads:
    """Queries and keys turned by their position, and values: three [b, s, heads, d] from packed [b, s, heads * 3d].

    table [2, s, d/2]: cosines and sines in fp32; the turn is computed in fp32 and rounded once.
    """
    run = registry.implementation("rotary", reference_split_and_rotate, "triton_rotary:split_and_rotate")
    return run(packed, table, heads)


def reference_split_and_rotate(packed: torch.Tensor, table: torch.Tensor, heads: int) -> Heads:
    query, key, value = by_head(packed, heads).unbind(-2)
    cosine, sine = table[:, None, :, None, :]

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)

    return turned(query), turned(key), value
