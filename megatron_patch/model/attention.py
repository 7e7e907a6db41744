"""Megatron's self-attention over the tokens of a micro-batch that lie row after row."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention

from megatron_patch.kernels.attention import causal_attention
from megatron_patch.kernels.rotary import split_and_rotate


class SelfAttention(MegatronSelfAttention):
    """Megatron's self-attention with the split of QKV and the rotary embedding as one kernel (kernels/rotary.py).

    Input and output [b * s, 1, h], or a rank's part of it under sequence parallelism (model/gpt.py). `rotary_pos_emb`
    is a RotaryTable's [2, s, d/2], whose s says where a row ends.
    """

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: None, *, rotary_pos_emb: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, None]:
        packed, _ = self.linear_qkv(hidden_states)
        rows = packed.view(-1, rotary_pos_emb.shape[1], packed.shape[-1])
        query, key, value = split_and_rotate(rows, rotary_pos_emb, self.num_attention_heads_per_partition)
        return self.linear_proj(causal_attention(query, key, value).reshape(len(packed), 1, -1))
