"""Causal attention that never forms an s x s matrix of scores or masks, by libraries' kernels.

flash-attn where it is installed, else torch's scaled_dot_product_attention, which on Hopper takes cuDNN's kernels; over
several sequences of any lengths, flash attention's kernels for these, of either library.
Under deterministic algorithms torch refuses those, since their backward adds in no fixed order; their forward has one,
and gives what flash attention's ordered backward needs: `by_cudnn_and_flash` puts the two together.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.nn.attention.varlen import varlen_attn

try:
    from flash_attn import flash_attn_func, flash_attn_varlen_func
except ImportError:
    flash_attn_func = flash_attn_varlen_func = None

_aten = torch.ops.aten
_mixed_head_sizes: frozenset[int] = frozenset()  # for which `by_cudnn_and_flash` was found right on this device


def mix_for(head_sizes: frozenset[int]) -> None:
    """From now on deterministic attention of these head sizes takes cuDNN's forward and flash's backward."""
    global _mixed_head_sizes
    _mixed_head_sizes = head_sizes


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(query key^T / sqrt(d)) value over the positions up to each token's own; all four [b, s, heads, d].

    Where keys and values are more than queries, the queries are the last tokens', and the rest lies before them.
    Attention runs over the whole row and is not reset at end-of-document; see `packed_causal_attention`.
    """
    if query.shape[1] < key.shape[1]:
        return after_others(query, key, value)
    same_bits = torch.are_deterministic_algorithms_enabled()
    if flash_attn_func is not None and query.is_cuda and query.dtype != torch.float32:
        return flash_attn_func(query, key, value, causal=True, deterministic=same_bits)
    if same_bits and query.dtype == torch.bfloat16 and query.shape[-1] in _mixed_head_sizes:
        return by_cudnn_and_flash(query, key, value)
    return by_torch(query, key, value)


def packed_causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cumulative: torch.Tensor, longest: int
) -> torch.Tensor:
    """`causal_attention` inside each of n sequences that lie one after the other; all four [tokens, heads, d].

    cumulative int32 [n + 1]: the first token of each sequence, and the number of tokens; longest: the most of one.
    """
    in_flash = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    if query.is_cuda and in_flash:
        places = (cumulative, cumulative, longest, longest)
        if flash_attn_varlen_func is not None:
            same_bits = torch.are_deterministic_algorithms_enabled()
            return flash_attn_varlen_func(query, key, value, *places, causal=True, deterministic=same_bits)
        # torch's flash; a window of all tokens before and none after. A pair only where more is asked for.
        return cast(torch.Tensor, varlen_attn(query, key, value, *places, window_size=(-1, 0)))
    return one_by_one(query, key, value, cumulative)


def one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cumulative: torch.Tensor) -> torch.Tensor:
    """The reference of `packed_causal_attention`: each sequence as if it were alone. Waits for the device."""
    lengths = cumulative.diff().tolist()
    parts = zip(*(t[None].split(lengths, dim=1) for t in (query, key, value)), strict=True)
    return torch.cat([by_torch(*part) for part in parts], dim=1)[0]


def by_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """torch's own choice among its kernels."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2)


def after_others(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of the last s of n tokens [b, s, heads, d], over keys and values of all [b, n, heads, d]."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    s, n = query.shape[1], key.shape[1]
    seen = None if s == 1 else torch.ones(s, n, dtype=torch.bool, device=query.device).tril(n - s)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


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
