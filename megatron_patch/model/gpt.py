"""The model of a rank: Megatron-Core's GPTModel with the loss fused into the output projection."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_patch import device
from megatron_patch.kernels.loss import linear_cross_entropy


class MobiLlama(GPTModel):
    """One model chunk. With `labels` it returns a loss, without them logits [b, s, V/TP].

    forward(tokens [b, s], None, None, labels=[b, s], loss_mask=[b, s]): the sum over tokens of loss_mask times the
    cross-entropy, an fp32 scalar to be differentiated unscaled (kernels/loss.py). Chunks that are not the last stage
    return hidden states [s, b, h].
    """

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config, position_embedding_type="rope", **kwargs)
        self.rotary_pos_emb = RotaryTable(
            config.kv_channels, rotary_percent=1.0, rotary_base=self.rotary_base, use_cpu_initialization=True
        )

    def _postprocess(
        self, hidden_states: torch.Tensor, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
        return linear_cross_entropy(
            hidden_states,
            self.output_layer.weight,
            labels.t(),
            kwargs["loss_mask"].t(),
            tensor_group=self.pg_collection.tp,
            sequence_parallel=self.config.sequence_parallel,
        )


class RotaryTable(RotaryEmbedding):
    """Gives cosines and sines [2, s, d/2] in fp32, where mcore's gives angles that every layer would take them of."""

    @functools.lru_cache(maxsize=8)  # noqa: B019 - lives as long as its model
    def forward(self, max_seq_len: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.inv_freq: torch.Tensor = self.inv_freq.to(device.current())
        return torch.stack(self.get_cos_sin(max_seq_len))
