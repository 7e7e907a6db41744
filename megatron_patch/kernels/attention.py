"""Causal attention that never forms an s x s matrix of scores or masks, by libraries' kernels.

flash-attn where it is installed, else torch's scaled_dot_product_attention, which on Hopper takes cuDNN's kernels.
Under deterministic algorithms torch refuses those, since their backward adds in no fixed order; their forward has one,
and gives what flash attention's ordered backward needs: `by_cudnn_and_flash` puts the two together.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None

_aten = torch.ops.aten
_mixed_head_sizes: frozenset[int] = frozenset()  # for which `by_cudnn_and_flash` was found right on this device


def mix_for(head_sizes: frozenset[int]) -> None:
    """From now on deterministic attention of these head sizes takes cuDNN's forward and flash's backward."""
    global _mixed_head_sizes
    _mixed_head_sizes = head_sizes


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(query key^T / sqrt(d)) value over the positions up to each token's own; all four [b, s, heads, d].

    Attention runs over the whole row and is not reset at end-of-document.
    """
    same_bits = torch.are_deterministic_algorithms_enabled()
    if flash_attn_func is not None and query.is_cuda and query.dtype != torch.float32:
        return flash_attn_func(query, key, value, causal=True, deterministic=same_bits)
    if same_bits and query.dtype == torch.bfloat16 and query.shape[-1] in _mixed_head_sizes:
        return by_cudnn_and_flash(query, key, value)
    return by_torch(query, key, value)


def by_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """torch's own choice among its kernels."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2)


def by_cudnn_and_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """cuDNN's forward, flash attention's backward; the same bits from run to run under deterministic algorithms."""
    return _CudnnAndFlash.apply(query, key, value)


class _CudnnAndFlash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        heads = [t.transpose(1, 2) for t in (query, key, value)]
        out, log_sums, _, _, longest, _, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(
            *heads, None, True, 0.0, True, False
        )
        ctx.save_for_backward(*heads, out, log_sums, seed, offset)
        ctx.longest = longest
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, out, log_sums, seed, offset = ctx.saved_tensors
        gradients = _aten._scaled_dot_product_flash_attention_backward(
            d_out.transpose(1, 2),
            query,
            key,
            value,
            out,
            log_sums.view(query.shape[:3]),
            None,  # rows of one length
            None,
            ctx.longest,
            ctx.longest,
            0.0,
            True,
            seed,
            offset,
        )
        return tuple(t.transpose(1, 2) for t in gradients)
