"""Megatron's self-attention over the tokens of a micro-batch that lie row after row."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention

from megatron_patch.kernels.attention import causal_attention, packed_causal_attention
from megatron_patch.kernels.rotary import split_and_rotate


class SelfAttention(MegatronSelfAttention):
    """Megatron's self-attention with the split of QKV and the rotary embedding as one kernel (kernels/rotary.py).

    Input and output [b * s, 1, h], or a rank's part of it under sequence parallelism (model/gpt.py). `rotary_pos_emb`
    is a RotaryTable's [2, s, d/2], whose s says where a row ends; with `packed_seq_params` it is [2, b * s, d/2], of
    each token's position in its sequence, and attention runs inside each sequence.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: None,
        *,
        rotary_pos_emb: torch.Tensor,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        packed, _ = self.linear_qkv(hidden_states)
        rows = packed.view(-1, rotary_pos_emb.shape[1], packed.shape[-1])
        query, key, value = split_and_rotate(rows, rotary_pos_emb, self.num_attention_heads_per_partition)
        if packed_seq_params is None:
            attended = causal_attention(query, key, value)
        else:
            places = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
            attended = packed_causal_attention(query[0], key[0], value[0], *places)
        return self.linear_proj(attended.reshape(len(packed), 1, -1))
