"""The model of a rank: the parts of Megatron-Core's GPTModel, over tokens that lie row after row, and a fused loss.

Megatron lays hidden states out as [s, b, h]. Here a micro-batch is one sequence of its tokens, [b * s, 1, h], all of
its first row before its second: to embedding, norms, linear layers, sequence parallelism and pipeline a token is a
token, and the attention kernels, which alone know of rows, find each whole in memory and need no copy turned round.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_patch.kernels.loss import linear_cross_entropy
from megatron_patch.model.attention import Seen
from megatron_patch.parallel import device
from megatron_patch.recipe import Vision
from megatron_patch.vision.images import ImageTokens, Pictures


class Conversations(NamedTuple):
    """Where attention and positions of a micro-batch begin anew."""

    cumulative: torch.Tensor
    """int32 [n + 1]: the first token of each conversation among the b * s, and b * s."""
    positions: torch.Tensor
    """int64 [b * s]: of each token in its conversation."""
    longest: int
    """Tokens of the longest one."""


class MobiLlama(GPTModel):
    """One model chunk."""

    def __init__(self, config: TransformerConfig, vision: Vision | None = None, **kwargs: Any) -> None:
        super().__init__(config, position_embedding_type="rope", **kwargs)
        self.vision: ImageTokens | None = None
        if vision is not None and self.pre_process:
            self.vision = ImageTokens(vision, config.hidden_size, config.params_dtype)
        self.rotary_pos_emb = RotaryTable(
            config.kv_channels, rotary_percent=1.0, rotary_base=self.rotary_base, use_cpu_initialization=True
        )

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor | None = None,
        coefficients: torch.Tensor | None = None,
        conversations: Conversations | None = None,
        seen: Seen | None = None,
        pictures: Pictures | None = None,
    ) -> torch.Tensor:
        """Of tokens [b, s]: with labels and coefficients [b, s] a loss, without them logits [b, s, V/TP].

        The loss is the sum over tokens of coefficient times cross-entropy, an fp32 scalar to be differentiated
        unscaled (kernels/loss.py). Chunks that are not the last stage return hidden states [b * s, 1, h], those that
        are not the first take them by `set_input_tensor`, and of `tokens` the shape alone. With `conversations` tokens
        see their own conversation and nothing before it, as if each were run alone. With `seen`, tokens follow those of
        the calls before with the same `seen`. `pictures` take the places of their placeholders.
        """
        b, s = tokens.shape
        first = seen.tokens if seen is not None else 0
        table, packed = self.rotary_pos_emb(first + s)[:, first:], None
        if conversations is not None:
            table = table[:, conversations.positions]  # of all tokens, which attention then takes as one row
            cumulative, longest = conversations.cumulative, conversations.longest
            packed = PackedSeqParams("thd", cumulative, cumulative, max_seqlen_q=longest, max_seqlen_kv=longest)
        hidden = self._embedded(tokens, pictures) if self.pre_process else None
        with self._keeping(seen, s):
            hidden = self.decoder(hidden, None, rotary_pos_emb=table, packed_seq_params=packed)
        if not self.post_process:
            return hidden
        if labels is None:
            logits, _ = self.output_layer(hidden)
            return logits.view(b, s, -1)
        assert coefficients is not None
        return linear_cross_entropy(
            hidden,
            self.output_layer.weight,
            labels.reshape(-1, 1),
            coefficients.reshape(-1, 1),
            tensor_group=self.pg_collection.tp,
            sequence_parallel=self.config.sequence_parallel,
        )

    @contextlib.contextmanager
    def _keeping(self, seen: Seen | None, count: int) -> Iterator[None]:
        """While it lasts, attention has `seen`, to which `count` tokens are added."""
        if seen is None:
            yield
            return
        layers = [layer.self_attention for layer in self.decoder.layers]
        try:
            for attention in layers:
                attention.seen = seen
            yield
            seen.tokens += count
        finally:
            for attention in layers:
                attention.seen = None

    def _embedded(self, tokens: torch.Tensor, pictures: Pictures | None) -> torch.Tensor:
        """What the first layer takes: of each token its embedding, or its part of an image."""
        hidden = self.embedding(tokens.reshape(1, -1), None)
        if self.vision is None:
            return hidden
        if pictures is not None:
            first = self.pg_collection.tp.rank() * len(hidden) if self.config.sequence_parallel else 0
            hidden = self.vision.put(hidden, pictures, first)
        if torch.is_grad_enabled() and not hidden.requires_grad:
            hidden.requires_grad_()  # a frozen decoder over text alone: backward has nothing to reach, and must run
        return hidden


class RotaryTable(RotaryEmbedding):
    """Gives cosines and sines [2, s, d/2] in fp32, where mcore's gives angles that every layer would take them of."""

    @functools.lru_cache(maxsize=8)  # noqa: B019 - lives as long as its model
    def forward(self, max_seq_len: int) -> torch.Tensor:
        self.inv_freq: torch.Tensor = self.inv_freq.to(device.current())
        return torch.stack(self.get_cos_sin(max_seq_len))
