"""The layer spec: a Megatron-Core decoder layer whose FFN is one module for all layers of a rank that use it.

The pre-FFN norm stays outside the FFN (Transformer Engine's fused spec would share 22 norms with it), so norms are
per layer while the FFN is shared, as in the released modelling code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_patch.kernels.swiglu import swiglu
from megatron_patch.model.attention import SelfAttention
from megatron_patch.model.norm import RMSNorm
from megatron_patch.model.parameters import ffn_prefix
from megatron_patch.recipe import Model


class FFN(MLP):
    """The SwiGLU FFN: fc1 gives gate and up in one GEMM, fc2 takes their product. Input and output [b * s, 1, h]."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        packed, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(swiglu(packed))


class SharedModules:
    """Holds the modules of a rank that several layers use; the first layer that asks for one builds it.

    Pass one holder to the specs of all model chunks of a rank, and virtual pipeline stages share them too. Stages on
    other ranks hold replicas, which `optim/gradients.py` keeps bit-identical.
    """

    def __init__(self) -> None:
        self._modules: dict[str, torch.nn.Module] = {}

    def get(self, name: str, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        """The module of this name (model/parameters.py says which layers use which)."""
        if name not in self._modules:
            self._modules[name] = build()
        return self._modules[name]


class DecoderLayer(TransformerLayer):
    """A decoder layer whose norms take the residual along (kernels/norm.py).

    Megatron's own forward also serves cross-attention, biases, dropout and inference, none of which MobiLlama has.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        *_: Any,
        rotary_pos_emb: torch.Tensor,
        packed_seq_params: PackedSeqParams | None = None,
        **__: Any,
    ) -> tuple[torch.Tensor, None]:
        """Hidden states [b * s, 1, h] to the same; the None is Megatron's cross-attention context."""
        hidden_states, normed = self.input_layernorm.beside(hidden_states)
        attended, _ = self.self_attention(
            normed, None, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params
        )
        hidden_states, normed = self.pre_mlp_layernorm.after_adding(attended, hidden_states)
        output, _ = checkpoint(self.mlp, False, normed) if self.recompute_mlp else self.mlp(normed)
        return hidden_states + output, None


class SharedFFNLayer(DecoderLayer):
    """A decoder layer that takes its FFN from a holder instead of building one (paper Figure 2)."""

    def __init__(
        self, config: TransformerConfig, *args: Any, model: Model, shared: SharedModules, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.mlp = shared.get(
            ffn_prefix(model, self.layer_number - 1),
            lambda: FFN(config, _FFN_SUBMODULES, ffn_hidden_size=config.ffn_hidden_size, tp_group=self.tp_group),
        )


_FFN_SUBMODULES = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)

_ATTENTION = ModuleSpec(
    module=SelfAttention,
    params={"attn_mask_type": AttnMaskType.causal},
    submodules=SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=IdentityOp, linear_proj=RowParallelLinear
    ),
)


def layer_spec(model: Model, shared: SharedModules) -> ModuleSpec:
    """Spec of a decoder layer: with an FFN of the holder, or with one of its own where the model shares none."""
    submodules = TransformerLayerSubmodules(
        input_layernorm=RMSNorm, self_attention=_ATTENTION, pre_mlp_layernorm=RMSNorm
    )
    if model.shared_ffn:
        return ModuleSpec(module=SharedFFNLayer, params={"model": model, "shared": shared}, submodules=submodules)
    submodules.mlp = ModuleSpec(module=FFN, submodules=_FFN_SUBMODULES)
    return ModuleSpec(module=DecoderLayer, submodules=submodules)


def block_spec(
    config: TransformerConfig, model: Model, shared: SharedModules, chunk: int | None
) -> TransformerBlockSubmodules:
    """The layers of one model chunk of this rank, and the final norm."""
    count = get_num_layers_to_build(config, vp_stage=chunk)
    return TransformerBlockSubmodules(layer_specs=[layer_spec(model, shared)] * count, layer_norm=RMSNorm)
