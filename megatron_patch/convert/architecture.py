"""Whether the model that a `config.json` describes computes what ours does.

Shapes tell little: models of many names have LLaMA's tensors and another arithmetic (multipliers, windows, soft caps, a
rotary embedding that is scaled or partial). So every key is judged: it is the recipe's, or at the value with which it
changes nothing, or known to be of no consequence; a key of which nothing is known is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_patch.convert.names import ffn_table
from megatron_patch.convert.source import ConvertError
from megatron_patch.recipe import Recipe

_FROM_RECIPE = {  # of the configuration -> of the recipe's model; the first ones must be there
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "rms_norm_eps": "norm_epsilon",
    "head_dim": "head_dim",
}
_OPTIONAL = {"head_dim"}

_ARCHITECTURES = {"llama": {"LlamaForCausalLM", "MobiLlamaForCausalLM"}, "mobillama": {"MobiLlamaForCausalLM"}}
"""model_type -> architectures; the authors' folders say llama and MobiLlamaForCausalLM."""

_TABLE = "ffn_of_layer"

_ROPE_BASE = 10000  # of LLaMA where nothing is said; the authors' code knows no other
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {  # values with which a key changes nothing; null is one for each
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "hidden_act": ("silu", "swish"),
    "is_encoder_decoder": (False,),
    "is_llama_config": (True,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_sliding_window": (False,),
}

_OF_NO_CONSEQUENCE = {
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled",
    "_name_or_path", "attention_dropout", "attn_implementation", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder",
    "label2id", "length_penalty", "max_length", "max_position_embeddings", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_key_value_heads", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "shared_ffn", "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class",
    "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache",
}  # fmt: skip
"""Said of files, precision, training, generation or labels; of how, not of what is computed. The tensors have the
last word on num_key_value_heads (the authors' 4 is wrong) and on shared_ffn."""


def check(config: dict[str, Any], recipe: Recipe, file: Path) -> None:
    """Raises ConvertError naming `file`, the key of its content `config`, and what to do."""
    _check_kind(config, file)
    if config.get("quantization_config") is not None:
        raise ConvertError(f"{file}: quantization_config: fetch the weights that are not quantised")
    for key, ours in _FROM_RECIPE.items():
        theirs, expected = config.get(key), getattr(recipe.model, ours)
        if key in _OPTIONAL and theirs is None:
            continue
        if isinstance(theirs, bool) or theirs != expected:
            raise ConvertError(
                f"{file}: {key} is {_shown(theirs)}, but the recipe {recipe.name} has model.{ours} {expected}; choose "
                "the recipe of this model with --recipe"
            )
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        raise ConvertError(f"{file}: tie_word_embeddings is {_shown(config['tie_word_embeddings'])}, not true or false")
    _check_rotary(config, recipe, file)
    _check_attention(config, file)
    if config.get(_TABLE) is not None and config[_TABLE] != (table := ffn_table(recipe.model)):
        raise ConvertError(
            f"{file}: {_TABLE} is {_shown(config[_TABLE])}, but in the recipe {recipe.name} layers use the FFNs "
            f"{'one for all or one each' if table is None else table} (model.num_ffns, model.ffn_pattern); "
            "choose the recipe of this model with --recipe"
        )
    for key, value in config.items():
        allowed = _WITHOUT_EFFECT.get(key)
        if allowed is not None and value is not None and not is_one_of(value, allowed):
            raise ConvertError(
                f"{file}: {key} is {_shown(value)}, which computes otherwise than MobiLlama "
                f"({' or '.join(map(repr, allowed))}); it cannot be imported"
            )
    judged = {*_FROM_RECIPE, *_WITHOUT_EFFECT, *_OF_NO_CONSEQUENCE, *_ELSEWHERE}
    unknown = [key for key, value in config.items() if key not in judged and value is not None]
    if unknown:
        raise ConvertError(
            f"{file}: unknown key{'s' if len(unknown) > 1 else ''} {', '.join(map(_shown, unknown[:5]))}"
            + (f" and {len(unknown) - 5} others" if len(unknown) > 5 else "")
            + ", which may change what is computed; if you know that this model is LLaMA without "
            f"{'them' if len(unknown) > 1 else 'it'}, remove {'them' if len(unknown) > 1 else 'it'} from the file"
        )


_ELSEWHERE = {
    "model_type", "architectures", "auto_map", "quantization_config", "tie_word_embeddings", "rope_theta",
    "rope_scaling", "rope_parameters", "sliding_window", "layer_types", _TABLE,
}  # fmt: skip
"""Keys that the checks above and below judge by themselves."""


def _check_kind(config: dict[str, Any], file: Path) -> None:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        raise ConvertError(
            f"{file}: model_type is {_shown(kind)}; {' and '.join(_ARCHITECTURES)} are imported, others compute "
            "otherwise"
        )
    known = _ARCHITECTURES[kind]
    named = config.get("architectures") or []
    code = config.get("auto_map") or {}
    if not isinstance(named, list) or not isinstance(code, dict):
        raise ConvertError(f"{file}: architectures or auto_map is not what transformers writes; fetch it again")
    causal = code.get("AutoModelForCausalLM", "")
    for name in [*named, *([str(causal).rpartition(".")[2]] if causal else [])]:
        if not isinstance(name, str) or name not in known:
            raise ConvertError(
                f"{file}: the architecture {_shown(name)} of a model of type {kind}; {' or '.join(sorted(known))} is "
                "imported"
            )


def _check_rotary(config: dict[str, Any], recipe: Recipe, file: Path) -> None:
    """Every place at which the versions of transformers look for it: what one of them does not read another does."""
    said: list[tuple[str, Any]] = []
    if config.get("rope_theta") is not None:
        said.append(("base", config["rope_theta"]))
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ConvertError(f"{file}: {key}: its rotary embedding is {_shown(rope)}, not an object")
        said += [("type", rope[name]) for name in ("rope_type", "type") if rope.get(name) is not None]
        if rope.get("rope_theta") is not None:
            said.append(("base", rope["rope_theta"]))
        if rope.get("partial_rotary_factor") is not None:
            said.append(("share of a head", rope["partial_rotary_factor"]))
        said += [(str(name), value) for name, value in rope.items() if name not in _ROPE_KEYS and value is not None]
    if not any(what == "base" for what, _ in said):
        said.append(("base", _ROPE_BASE))
    expected = {"type": "default", "base": recipe.model.rope_base, "share of a head": 1}
    for what, value in said:
        if isinstance(value, bool) or what not in expected or value != expected[what]:
            raise ConvertError(
                f"{file}: rotary embedding with {what} {_shown(value)}; the recipe {recipe.name} has type default, "
                f"model.rope_base {recipe.model.rope_base:g}, over whole heads, and nothing else"
            )


def _check_attention(config: dict[str, Any], file: Path) -> None:
    if config.get("sliding_window") is not None and config.get("use_sliding_window") is not False:
        raise ConvertError(
            f"{file}: sliding_window is {_shown(config['sliding_window'])}; MobiLlama attends to the whole row, so the "
            "model cannot be imported"
        )
    layers = config.get("layer_types")
    if layers is not None and not (isinstance(layers, list) and all(kind == "full_attention" for kind in layers)):
        raise ConvertError(f"{file}: layer_types is {_shown(layers)}; MobiLlama has full_attention in every layer")


def is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether a setting has one of these values; True is not 1."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def _shown(value: Any) -> str:
    text = repr(int(value) if isinstance(value, float) and value.is_integer() else value)
    return text if len(text) <= 80 else text[:77] + "..."
