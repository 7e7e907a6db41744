# The arguments of a Triton kernel are pointers and scalars without a Python type.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton kernel of kernels/rotary.py: one program a token, all its heads as a [heads, d/2] tile.

Backward is the same kernel with the copies turned round and the angles negated: the gradients of q, k and v are turned
back straight into the gradient of the packed projection.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from megatron_patch.kernels import packed_qkv


class SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, packed: torch.Tensor, table: torch.Tensor, heads: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        b, s, width = packed.shape
        packed = packed.contiguous()
        query, key, value = (packed.new_empty((b, s, heads, width // heads // packed_qkv.PARTS)) for _ in range(3))
        _launch(packed, (query, key, value), table, backward=False)
        ctx.save_for_backward(table)
        ctx.shape = packed.shape
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *d_parts: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (table,) = ctx.saved_tensors
        d_packed = d_parts[0].new_empty(ctx.shape)
        _launch(d_packed, tuple(d.contiguous() for d in d_parts), table, backward=True)
        return d_packed, None, None


def split_and_rotate(
    packed: torch.Tensor, table: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return SplitAndRotate.apply(packed, table, heads)


def _launch(packed: torch.Tensor, parts: tuple[torch.Tensor, ...], table: torch.Tensor, backward: bool) -> None:
    b, s, heads, d = parts[0].shape
    _turn[(b * s,)](
        packed,
        *parts,
        table.contiguous(),
        s,
        heads,
        d // 2,
        BACKWARD=backward,
        PARTS=packed_qkv.PARTS,
        HEADS=triton.next_power_of_2(heads),
        HALF=triton.next_power_of_2(d // 2),
    )


@triton.jit
def _turn(
    packed,
    query,
    key,
    value,
    table,
    positions,
    heads: tl.constexpr,
    half: tl.constexpr,
    BACKWARD: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = token % positions
    head = tl.arange(0, HEADS)[:, None]
    lane = tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (lane < half)
    cosine = tl.load(table + position * half + lane, mask=lane < half, other=0.0)
    sine = tl.load(table + (positions + position) * half + lane, mask=lane < half, other=0.0)
    if BACKWARD:
        sine = -sine
    in_part = (token * heads + head) * 2 * half + lane
    in_packed = (token * heads + head) * PARTS * 2 * half + lane
    for which in tl.static_range(PARTS):
        part = query if which == 0 else (key if which == 1 else value)
        whole = packed + in_packed + which * 2 * half
        source = part + in_part if BACKWARD else whole
        target = whole if BACKWARD else part + in_part
        first = tl.load(source, mask=inside, other=0.0)
        second = tl.load(source + half, mask=inside, other=0.0)
        if which < 2:
            wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
            first = (wide_first * cosine - wide_second * sine).to(packed.dtype.element_ty)
            second = (wide_second * cosine + wide_first * sine).to(packed.dtype.element_ty)
        tl.store(target, first, mask=inside)
        tl.store(target + half, second, mask=inside)
