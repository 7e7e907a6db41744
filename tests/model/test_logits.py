"""Our model against `transformers`: the FFN written out 22 times in a stock LlamaForCausalLM gives the same logits."""

import numpy as np
import pytest
import torch

from megatron_patch.model.attention import Seen
from megatron_patch.model.parameters import local_parameters
from tests.ranks import run_ranks
from tests.toy import toy_recipe, toy_trainer

DEEP = ["model.num_ffns=1", "model.num_layers=22", "model.hidden_size=40", "model.ffn_hidden_size=56"]
TOKENS = np.random.RandomState(0).randint(0, 64, (3, 16))


def our_logits(overrides: list[str]):
    """fp32 logits [rows, tokens, vocab] of seeded weights, with weights far enough from zero to tell layers apart.

    Of whole rows, and of the same rows a few tokens after the other, keys and values of those before kept.
    """
    trainer = toy_trainer(toy_recipe(*overrides))
    weights = {}
    for whole, parameter in local_parameters(trainer.chunks, trainer.recipe.model):
        if whole.kind == "norm":
            parameter.data += torch.linspace(-0.5, 0.5, parameter.numel())
        else:
            parameter.data *= 5.0
        weights[whole.name] = parameter.detach().clone()
    model, rows, seen = trainer.chunks[0], torch.from_numpy(TOKENS), Seen(TOKENS.shape[1])
    with torch.no_grad():
        parts = [model(part, seen=seen) for part in rows.split([5, 1, 1, 6, 3], dim=1)]
        return model(rows), torch.cat(parts, 1), weights


def expanded(weights: dict[str, torch.Tensor], layers: int, heads: int) -> dict[str, torch.Tensor]:
    """Stock Llama names by hand, the shared FFN copied to every layer."""
    state = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["final_layernorm.weight"],
        "lm_head.weight": weights["output_layer.weight"],
    }
    fc1 = weights["ffn.linear_fc1.weight"]
    gate, up = fc1.chunk(2)
    for i in range(layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        qkv = weights[ours + "self_attention.linear_qkv.weight"]
        by_head = qkv.view(heads, 3, -1, qkv.shape[1])
        for n, name in enumerate("qkv"):
            state[f"{theirs}self_attn.{name}_proj.weight"] = by_head[:, n].reshape(-1, qkv.shape[1])
        state[theirs + "self_attn.o_proj.weight"] = weights[ours + "self_attention.linear_proj.weight"]
        state[theirs + "input_layernorm.weight"] = weights[ours + "input_layernorm.weight"]
        state[theirs + "post_attention_layernorm.weight"] = weights[ours + "pre_mlp_layernorm.weight"]
        state[theirs + "mlp.gate_proj.weight"] = gate
        state[theirs + "mlp.up_proj.weight"] = up
        state[theirs + "mlp.down_proj.weight"] = weights["ffn.linear_fc2.weight"]
    return state


@pytest.mark.parametrize("norm_epsilon", ["1e-5", "1e-6"])
def test_logits_equal_stock_llama(norm_epsilon):
    from transformers import LlamaConfig, LlamaForCausalLM

    overrides = [*DEEP, f"model.norm_epsilon={norm_epsilon}"]
    model = toy_recipe(*overrides).model
    ours, in_parts, weights = run_ranks(1, our_logits, overrides)[0]
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_attention_heads,
            rms_norm_eps=model.norm_epsilon,
            rope_theta=model.rope_base,
            max_position_embeddings=model.sequence_length,
            tie_word_embeddings=False,
        )
    ).eval()
    llama.load_state_dict(expanded(weights, model.num_layers, model.num_attention_heads), strict=True)
    with torch.no_grad():
        theirs = llama(torch.from_numpy(TOKENS)).logits
    assert theirs.abs().max() > 1  # the comparison is of numbers worth comparing
    for found in (ours, in_parts):
        assert (found - theirs).abs().max() < 1e-5 * theirs.abs().max()


def loss_and_logits(overrides: list[str]):
    trainer = toy_trainer(toy_recipe(*overrides))
    tokens, labels, coefficients = labelled()
    with torch.no_grad():
        return trainer.chunks[0](tokens, labels, coefficients), trainer.chunks[0](tokens)


def labelled() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, and for each of their tokens a label and a coefficient of its own."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(64, (2, 3, 16), generator=generator)
    return tokens, labels, torch.rand(3, 16, generator=generator)


@pytest.mark.parametrize("more", [[], ["parallel.tensor=2", "parallel.sequence=true"]], ids=["one rank", "TP2 with SP"])
def test_each_coefficient_goes_with_its_token(more):
    _, labels, coefficients = labelled()
    answers = run_ranks(2 if more else 1, loss_and_logits, [*DEEP, *more])
    logits = torch.cat([part for _, part in answers], -1)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), reduction="none")
    expected = (losses * coefficients.flatten()).sum().item()
    assert [loss.item() for loss, _ in answers] == pytest.approx([expected] * len(answers), rel=1e-5)
