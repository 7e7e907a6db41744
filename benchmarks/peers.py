"""The peers of the GPU benchmark: the same shape and step in other people's code, with what makes each of them fast.

A peer's weights, gradients and AdamW moments are bf16 where ours are fp32 beside the bf16 weights: its optimizer moves
fewer bytes, an advantage that the comparison leaves it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_patch.parallel import device, topology
from megatron_patch.recipe import Recipe

Step = Callable[[torch.Tensor], torch.Tensor]


def hugging_face(recipe: Recipe, compiled: bool) -> Step:
    """`transformers`' LlamaForCausalLM with SDPA and one FFN module for all layers, eager or under torch.compile."""
    from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

    # It asks of every batch whether several sequences are packed in a row: on the host, or, compiled, by giving SDPA a
    # mask, which shuts flash attention out. None are.
    masking_utils.find_packed_sequence_indices = lambda _: None
    m = recipe.model
    config = LlamaConfig(
        vocab_size=m.vocab_size,
        hidden_size=m.hidden_size,
        intermediate_size=m.ffn_hidden_size,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_attention_heads,
        num_key_value_heads=m.num_attention_heads,
        rms_norm_eps=m.norm_epsilon,
        max_position_embeddings=m.sequence_length,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    with device.current():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
    if m.shared_ffn:
        for layer in model.model.layers:
            layer.mlp = model.model.layers[0].mlp
    forward = torch.compile(model, dynamic=False) if compiled else model
    return _stepper(model, recipe, lambda rows: forward(input_ids=rows, labels=rows).loss)


def megatron_core(recipe: Recipe) -> Step:
    """Megatron-Core's GPTModel with its own local spec, one FFN a layer (it shares none): scores of s x s, no flash."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    m = recipe.model
    topology.initialize(recipe.parallel)
    config = TransformerConfig(
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
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        masked_softmax_fusion=False,  # needs Megatron-LM's compiled extension, which megatron-core does not hold
        params_dtype=torch.bfloat16,
        bf16=True,
        pipeline_dtype=torch.bfloat16,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=m.vocab_size,
        max_sequence_length=m.sequence_length,
        position_embedding_type="rope",
        rotary_base=int(m.rope_base),
    ).to(device.current())
    positions = torch.arange(m.sequence_length, device=device.current())
    hidden = (
        torch.ones(m.sequence_length, m.sequence_length, device=device.current()).triu(diagonal=1).bool()[None, None]
    )
    return _stepper(
        model, recipe, lambda rows: model(rows, positions.expand(rows.shape), hidden, labels=rows).float().mean()
    )


def _stepper(model: torch.nn.Module, recipe: Recipe, loss_of: Callable[[torch.Tensor], torch.Tensor]) -> Step:
    o = recipe.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, betas=(o.beta1, o.beta2), eps=o.epsilon, weight_decay=o.weight_decay, fused=True
    )
    model.train()

    def step(micro_batches: torch.Tensor) -> torch.Tensor:
        """One optimizer step over tokens [num_micro_batches, micro_batch_size, s]."""
        total: Any = 0.0
        for rows in micro_batches:
            loss = loss_of(rows) / len(micro_batches)
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step
