"""The layer spec: a Megatron-Core decoder layer whose FFN is one module for all layers of a rank.

The pre-FFN norm stays outside the FFN (Transformer Engine's fused spec would share 22 norms with it), so norms are
per layer while the FFN is shared, as in the released modelling code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_patch.model.attention import CoreAttention
from megatron_patch.model.norm import RMSNorm


class SharedFFN:
    """Holds the one FFN of a rank; the first layer that asks builds it.

    Pass one holder to the specs of all model chunks of a rank, and virtual pipeline stages share it too. Stages on
    other ranks hold replicas, which `megatron_patch.gradients` keeps bit-identical.
    """

    def __init__(self) -> None:
        self._ffn: MLP | None = None

    def get(self, config: TransformerConfig, tensor_group: torch.distributed.ProcessGroup) -> MLP:
        if self._ffn is None:
            self._ffn = MLP(config, _FFN_SUBMODULES, ffn_hidden_size=config.ffn_hidden_size, tp_group=tensor_group)
        return self._ffn


class SharedFFNLayer(TransformerLayer):
    """A decoder layer that takes its FFN from a holder instead of building one (paper Figure 2)."""

    def __init__(self, config: TransformerConfig, *args: Any, ffn: SharedFFN, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.mlp = ffn.get(config, self.tp_group)


def residual_add(training: bool, fused: bool) -> Callable[..., torch.Tensor]:
    """What mcore calls bias-dropout-add, for a model that has neither bias nor dropout."""
    return _add


def _add(output_with_bias: tuple[torch.Tensor, None], residual: torch.Tensor, dropout: float) -> torch.Tensor:
    return residual + output_with_bias[0]


_FFN_SUBMODULES = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)

_ATTENTION = ModuleSpec(
    module=SelfAttention,
    params={"attn_mask_type": AttnMaskType.causal},
    submodules=SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=CoreAttention, linear_proj=RowParallelLinear
    ),
)


def layer_spec(ffn: SharedFFN | None) -> ModuleSpec:
    """Spec of a decoder layer: with the holder's FFN, or with an FFN of its own where `ffn` is None."""
    submodules = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=_ATTENTION,
        self_attn_bda=residual_add,
        pre_mlp_layernorm=RMSNorm,
        mlp_bda=residual_add,
    )
    if ffn is not None:
        return ModuleSpec(module=SharedFFNLayer, params={"ffn": ffn}, submodules=submodules)
    submodules.mlp = ModuleSpec(module=MLP, submodules=_FFN_SUBMODULES)
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def block_spec(config: TransformerConfig, ffn: SharedFFN | None, chunk: int | None) -> TransformerBlockSubmodules:
    """The layers of one model chunk of this rank, and the final norm."""
    count = get_num_layers_to_build(config, vp_stage=chunk)
    return TransformerBlockSubmodules(layer_specs=[layer_spec(ffn)] * count, layer_norm=RMSNorm)
