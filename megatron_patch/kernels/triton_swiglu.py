# The arguments of a Triton kernel are pointers and scalars without a Python type.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernels of kernels/swiglu.py: one program a row, one read and one write of each element either way."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


class SwiGLU(torch.autograd.Function):
    """Saves the packed input alone."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor) -> torch.Tensor:
        packed = packed.contiguous()
        width = packed.shape[-1] // 2
        out = packed.new_empty((*packed.shape[:-1], width))
        _forward[(out.numel() // width,)](packed, out, width, BLOCK=_block(width))
        ctx.save_for_backward(packed)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> torch.Tensor:
        (packed,) = ctx.saved_tensors
        width = packed.shape[-1] // 2
        d_packed = torch.empty_like(packed)
        _backward[(packed.numel() // (2 * width),)](packed, d_out.contiguous(), d_packed, width, BLOCK=_block(width))
        return d_packed


def swiglu(packed: torch.Tensor) -> torch.Tensor:
    return SwiGLU.apply(packed)


def _block(width: int) -> int:
    return min(2048, triton.next_power_of_2(width))


@triton.jit
def _forward(packed, out, width: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        column = start + lanes
        inside = column < width
        gate = tl.load(packed + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(packed + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        result = gate * tl.sigmoid(gate) * up
        tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(packed, d_out, d_packed, width: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        column = start + lanes
        inside = column < width
        gate = tl.load(packed + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(packed + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(d_out + row * width + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        d_gate = d * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        d_up = d * gate * sigmoid
        tl.store(d_packed + row * 2 * width + column, d_gate.to(d_packed.dtype.element_ty), mask=inside)
        tl.store(d_packed + row * 2 * width + width + column, d_up.to(d_packed.dtype.element_ty), mask=inside)
