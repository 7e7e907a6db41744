# The arguments of a Triton kernel are pointers and scalars without a Python type.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernels of kernels/norm.py: a row is held whole in registers.

Backward: each program takes every n-th row and keeps its part of the weight's gradient in fp32 registers; the parts
are summed afterwards in a fixed order, so the result is the same from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_COLUMNS = 8  # of a row that a thread holds: with 16, registers let half as many threads of the backward kernel run
_WARPS_PER_MULTIPROCESSOR = 32  # of the backward kernel: as many as run at once


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        x = x.contiguous()
        out, scale = _normed(x, None, None, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        return *_gradients(x, weight, scale, d_out, None), None


class RMSNormBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.contiguous()
        out, scale = _normed(x, None, None, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return x, out

    @staticmethod
    def backward(ctx: Any, d_x: torch.Tensor, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        return *_gradients(x, weight, scale, d_out, d_x), None


class AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.contiguous()
        total = torch.empty_like(x)
        out, scale = _normed(x, residual.contiguous(), total, weight, eps)
        ctx.save_for_backward(total, weight, scale)
        return total, out

    @staticmethod
    def backward(ctx: Any, d_total: torch.Tensor, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        d_x, d_weight = _gradients(total, weight, scale, d_out, d_total)
        return d_x, d_x, d_weight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return RMSNorm.apply(x, weight, eps)


def rms_norm_beside(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return RMSNormBeside.apply(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return AddRMSNorm.apply(x, residual, weight, eps)


def _normed(
    x: torch.Tensor, residual: torch.Tensor | None, total: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normed rows, like x, and 1 / sqrt(mean square + eps) of each row, fp32."""
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty_like(x)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    _forward[(rows,)](
        x,
        x if residual is None else residual,
        x if total is None else total,
        weight,
        out,
        scale,
        width,
        eps,
        ADDS=residual is not None,
        BLOCK=triton.next_power_of_2(width),
        num_warps=_warps(width),
    )
    return out, scale


def _gradients(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, d_out: torch.Tensor, d_total: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (`d_total`, the gradient that reaches it past the norm, added) and of the weight."""
    width = x.shape[-1]
    rows = x.numel() // width
    programs = min(rows, _WARPS_PER_MULTIPROCESSOR // _warps(width) * _multiprocessors(x.device))
    d_x = torch.empty_like(x)
    d_weight = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    d_out = d_out.contiguous()
    _backward[(programs,)](
        x,
        weight,
        scale,
        d_out,
        d_out if d_total is None else d_total.contiguous(),
        d_x,
        d_weight,
        rows,
        width,
        ADDS=d_total is not None,
        BLOCK=triton.next_power_of_2(width),
        num_warps=_warps(width),
    )
    return d_x, d_weight.sum(dim=0).to(weight.dtype)


def _warps(width: int) -> int:
    return min(max(triton.next_power_of_2(width) // (32 * _COLUMNS), 4), 16)


def _multiprocessors(device: torch.device) -> int:
    # Interpreted on a CPU, two programs are enough to test that they share the rows.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _forward(x, residual, total, weight, out, scale, width: tl.constexpr, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(residual + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * width + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)
    row_scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / width + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(scale + row, row_scale)
    tl.store(out + row * width + columns, (value * row_scale * w).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, weight, scale, d_out, d_total, d_x, d_weight, rows, width: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    own_d_weight = tl.zeros([BLOCK], tl.float32)
    # Not `range`: it asks for indices, and those of Triton 3.6's interpreter are arrays, which NumPy 2.4 refuses.
    row = program
    while row < rows:
        base = tl.cast(row, tl.int64) * width
        value = tl.load(x + base + columns, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(d_out + base + columns, mask=inside, other=0.0).to(tl.float32)
        row_scale = tl.load(scale + row)
        normed = value * row_scale
        own_d_weight += d * normed
        d_normed = d * w
        mean = tl.sum(d_normed * normed, axis=0) / width
        result = (d_normed - normed * mean) * row_scale
        if ADDS:
            result += tl.load(d_total + base + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + base + columns, result.to(d_x.dtype.element_ty), mask=inside)
        row += tl.num_programs(0)
    tl.store(d_weight + program * width + columns, own_d_weight, mask=inside)
