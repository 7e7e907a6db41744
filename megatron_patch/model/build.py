"""From a recipe to the model chunks of this rank."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as ps
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_patch.kernels import choice
from megatron_patch.model.gpt import MobiLlama
from megatron_patch.model.spec import SharedModules, block_spec
from megatron_patch.recipe import Recipe

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    # The FFN holds most of a layer's activations (gate, up and their product); attention recomputes inside flash.
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(recipe: Recipe) -> TransformerConfig:
    """Megatron-Core's configuration of this recipe."""
    m, p = recipe.model, recipe.parallel
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    interleaved = p.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        layernorm_epsilon=m.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        tensor_model_parallel_size=p.tensor,
        pipeline_model_parallel_size=p.pipeline,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline if interleaved else None,
        account_for_embedding_in_pipeline_split=recipe.pads_pipeline_split,
        account_for_loss_in_pipeline_split=recipe.pads_pipeline_split,
        sequence_parallel=p.sequence,
        # On two stages the previous and the next rank are the same one: batched sends and receives of the
        # interleaved schedule then pair up wrongly, silently. 1F1B needs them batched.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Backward needs of a sent output its graph alone. The interleaved schedule would free it before its send is
        # waited for, and neither gloo nor NCCL then holds the memory that it still reads.
        deallocate_pipeline_outputs=p.pipeline > 1 and not interleaved,
        # Created on torch's current default device and filled by model/initialise.py.
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=recipe.precision == "bf16",
        gradient_accumulation_fusion=True,
        # The step divides the summed loss by the tokens of the global batch; mcore must not average once more.
        calculate_per_token_loss=True,
        # Not deterministic_mode: of what runs here it would change the embedding alone (kernels/embedding.py).
        **_RECOMPUTE[recipe.recompute],
    )


def build(recipe: Recipe, device: torch.device) -> list[MobiLlama]:
    """The model chunks of this rank (one, or one per virtual stage), parameters not yet filled.

    Needs `topology.initialize`. On the meta device nothing is allocated. Decides which kernels this process runs.
    """
    if device.type != "meta":
        choice.choose(recipe.kernels, device)
    config = transformer_config(recipe)
    shared = SharedModules()
    virtual = recipe.parallel.virtual_pipeline
    with device:
        return [
            MobiLlama(
                config=config,
                vision=recipe.model.vision,
                transformer_layer_spec=block_spec(config, recipe.model, shared, chunk),
                vocab_size=recipe.model.vocab_size,
                max_sequence_length=recipe.model.sequence_length,
                pre_process=ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
                post_process=ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
                share_embeddings_and_output_weights=recipe.model.tied_embeddings,
                rotary_base=recipe.model.rope_base,
                vp_stage=chunk,
            )
            for chunk in (range(virtual) if virtual > 1 else [None])
        ]
