"""SwiGLU on the packed output of fc1: silu(gate) x up (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import torch

from megatron_patch.kernels import registry


def swiglu(packed: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for packed [..., 2f], gate before up; output [..., f], arithmetic in fp32."""
    return registry.implementation("swiglu", reference_swiglu, "triton_swiglu:swiglu")(packed)


def reference_swiglu(packed: torch.Tensor) -> torch.Tensor:
    gate, up = packed.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(packed.dtype)
