"""Causal self-attention that never forms an s x s matrix of scores or masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_patch.kernels.rotary import split_and_rotate

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


class CoreAttention(torch.nn.Module):
    """flash-attn where it is installed, else torch's scaled_dot_product_attention.

    Takes Megatron's place for `core_attention`: query, key, value [s, b, heads, head_dim] of this tensor-parallel
    rank, output [s, b, heads * head_dim]. Attention is causal over the whole row and not reset at end-of-document.
    """

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        assert config.kv_channels is not None
        self.scale = 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: None, **_: Any
    ) -> torch.Tensor:
        s, b, n, d = query.shape
        if flash_attn_func is not None and query.is_cuda and query.dtype != torch.float32:
            q, k, v = (t.transpose(0, 1) for t in (query, key, value))
            same_bits = torch.are_deterministic_algorithms_enabled()
            out = flash_attn_func(q, k, v, softmax_scale=self.scale, causal=True, deterministic=same_bits)
            return out.transpose(0, 1).reshape(s, b, n * d)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return out.permute(2, 0, 1, 3).reshape(s, b, n * d)


class SelfAttention(MegatronSelfAttention):
    """Megatron's self-attention with the split of QKV and the rotary embedding as one kernel (kernels/rotary.py).

    `rotary_pos_emb` is a RotaryTable's [2, s, d/2]. Input and output [s, b, h].
    """

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: None, *, rotary_pos_emb: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, None]:
        packed, _ = self.linear_qkv(hidden_states)
        heads = self.num_attention_heads_per_partition
        query, key, value = split_and_rotate(packed, rotary_pos_emb, heads)
        return self.linear_proj(self.core_attention(query, key, value, None))
