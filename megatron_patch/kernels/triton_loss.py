# The arguments of a Triton kernel are pointers and scalars without a Python type.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernels of kernels/loss.py: one program a row, fp32 arithmetic, columns in blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def row_statistics(
    logits: torch.Tensor, labels: torch.Tensor, first_label: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = logits.shape
    maximum, exponentials, label_logit = torch.empty((3, rows), dtype=torch.float32, device=logits.device).unbind()
    _row_statistics[(rows,)](
        logits,
        labels,
        maximum,
        exponentials,
        label_logit,
        first_label,
        columns,
        logits.stride(0),
        BLOCK=_block(columns),
        num_warps=8,
    )
    return maximum, exponentials, label_logit


def to_logits_gradient_(
    logits: torch.Tensor, labels: torch.Tensor, first_label: int, log_sum: torch.Tensor, coefficients: torch.Tensor
) -> None:
    rows, columns = logits.shape
    _to_logits_gradient[(rows,)](
        logits,
        labels,
        log_sum,
        coefficients,
        first_label,
        columns,
        logits.stride(0),
        BLOCK=_block(columns),
        num_warps=8,
    )


def _block(columns: int) -> int:
    return min(4096, triton.next_power_of_2(columns))


@triton.jit
def _row_statistics(
    logits, labels, maximum, exponentials, label_logit, first_label, columns: tl.constexpr, stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    lanes = tl.arange(0, BLOCK)
    # Each lane keeps the maximum and the sum of its own columns; lanes meet once, at the end. The start is finite, so
    # that a lane without columns contributes exp(-1e30 - maximum) = 0 times 0, not a NaN.
    lane_maximum = tl.full([BLOCK], -1.0e30, tl.float32)
    lane_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        x = tl.load(base + start + lanes, mask=inside, other=-1.0e30).to(tl.float32)
        higher = tl.maximum(lane_maximum, x)
        lane_sum = lane_sum * tl.exp(lane_maximum - higher) + tl.where(inside, tl.exp(x - higher), 0.0)
        lane_maximum = higher
    row_maximum = tl.max(lane_maximum, axis=0)
    row_sum = tl.sum(lane_sum * tl.exp(lane_maximum - row_maximum), axis=0)
    column = tl.load(labels + row) - first_label
    is_here = (column >= 0) & (column < columns)
    x = tl.load(base + column, mask=is_here, other=0.0).to(tl.float32)
    tl.store(maximum + row, row_maximum)
    tl.store(exponentials + row, row_sum)
    tl.store(label_logit + row, x)


@triton.jit
def _to_logits_gradient(
    logits, labels, log_sum, coefficients, first_label, columns: tl.constexpr, stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * stride
    lanes = tl.arange(0, BLOCK)
    row_log_sum = tl.load(log_sum + row)
    coefficient = tl.load(coefficients + row)
    column = tl.load(labels + row) - first_label
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        x = tl.load(base + start + lanes, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.exp(x - row_log_sum)
        gradient = tl.where(start + lanes == column, gradient - 1.0, gradient) * coefficient
        tl.store(base + start + lanes, gradient.to(logits.dtype.element_ty), mask=inside)
