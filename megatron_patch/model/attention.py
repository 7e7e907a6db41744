"""Megatron's self-attention over the tokens of a micro-batch that lie row after row."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention

from megatron_patch.kernels.attention import causal_attention, packed_causal_attention
from megatron_patch.kernels.rotary import split_and_rotate


class Seen:
    """Keys and values of the tokens that a model was given before (a KV cache), so that each is computed once.

    Attributes:
        tokens: of each row, so far.
    """

    def __init__(self, limit: int) -> None:
        """For up to `limit` tokens a row."""
        self.tokens, self._limit = 0, limit
        self._kept: dict[int, torch.Tensor] = {}  # by layer: [2, b, limit, heads, d]

    def extended(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [b, n, heads, d] of all n tokens; `key` and `value` [b, s, heads, d] are the newest ones'."""
        b, s, heads, d = key.shape
        if layer not in self._kept:
            self._kept[layer] = key.new_empty(2, b, self._limit, heads, d)
        kept, end = self._kept[layer], self.tokens + s
        kept[0, :, self.tokens : end], kept[1, :, self.tokens : end] = key, value
        return kept[0, :, :end], kept[1, :, :end]


class SelfAttention(MegatronSelfAttention):
    """Megatron's self-attention with the split of QKV and the rotary embedding as one kernel (kernels/rotary.py).

    Input and output [b * s, 1, h], or a rank's part of it under sequence parallelism (model/gpt.py). `rotary_pos_emb`
    is a RotaryTable's [2, s, d/2], whose s says where a row ends; with `packed_seq_params` it is [2, b * s, d/2], of
    each token's position in its sequence, and attention runs inside each sequence.

    Attributes:
        seen: of the tokens before, while a model with `Seen` runs.
    """

    seen: Seen | None = None

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
        if self.seen is not None:
            key, value = self.seen.extended(self.layer_number, key, value)
        if packed_seq_params is None:
            attended = causal_attention(query, key, value)
        else:
            places = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
            attended = packed_causal_attention(query[0], key[0], value[0], *places)
        return self.linear_proj(attended.reshape(len(packed), 1, -1))
