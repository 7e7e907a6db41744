"""Import of our two forms and of the authors' published form; what must be refused is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_patch.__main__ import main
from megatron_patch.convert.export import export
from megatron_patch.convert.forward import compare
from megatron_patch.convert.imported import ImportedModel, recipe_of
from megatron_patch.convert.names import Form
from megatron_patch.convert.source import ConvertError
from megatron_patch.train.checkpoint.reader import open_checkpoint
from tests.convert.samples import MemoryWeights, small_recipe

INV_FREQ = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
LLAMA_4 = json.loads("""{
  "_name_or_path": "", "add_cross_attention": false, "architectures": ["LlamaForCausalLM"], "attention_bias": false,
  "attention_dropout": 0.0, "bad_words_ids": null, "begin_suppress_tokens": null, "bos_token_id": 1,
  "chunk_size_feed_forward": 0, "cross_attention_hidden_size": null, "decoder_start_token_id": null,
  "diversity_penalty": 0.0, "do_sample": false, "early_stopping": false, "encoder_no_repeat_ngram_size": 0,
  "eos_token_id": 2, "exponential_decay_length_penalty": null, "finetuning_task": null, "forced_bos_token_id": null,
  "forced_eos_token_id": null, "head_dim": 8, "hidden_act": "silu", "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
  "initializer_range": 0.02, "is_decoder": false, "is_encoder_decoder": false, "label2id": {"LABEL_0": 0},
  "length_penalty": 1.0, "max_length": 20, "max_position_embeddings": 2048, "min_length": 0, "mlp_bias": false,
  "model_type": "llama", "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_key_value_heads": 4,
  "num_return_sequences": 1, "output_attentions": false, "output_hidden_states": false, "output_scores": false,
  "pad_token_id": null, "prefix": null, "pretraining_tp": 1, "problem_type": null, "pruned_heads": {},
  "remove_invalid_values": false, "repetition_penalty": 1.0, "return_dict": true, "return_dict_in_generate": false,
  "rope_scaling": null, "rope_theta": 10000.0, "sep_token_id": null, "suppress_tokens": null,
  "task_specific_params": null, "temperature": 1.0, "tf_legacy_loss": false, "tie_encoder_decoder": false,
  "tie_word_embeddings": false, "tokenizer_class": null, "top_k": 50, "top_p": 1.0, "torch_dtype": "float32",
  "torchscript": false, "transformers_version": "4.48.0", "typical_p": 1.0, "use_bfloat16": false, "use_cache": true
}""")
"""Every key of `LlamaConfig().to_dict()` of transformers 4.48."""


def equal(model: ImportedModel, weights: MemoryWeights) -> bool:
    return all(torch.equal(model.tensor(name), tensor) for name, tensor in weights.whole.items())


@pytest.fixture
def published(weights: MemoryWeights, tokenizer: Path, tmp_path: Path) -> Path:
    """The authors' layout: 22 equal FFN copies in two fp32 `.bin` files, buffers included, KV heads misstated."""
    export(weights, tmp_path / "ours", "expanded", tokenizer)
    state = {k: v.clone() for k, v in load_file(tmp_path / "ours" / "model.safetensors").items()}
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": INV_FREQ.clone() for i in range(3)}
    folder = tmp_path / "published"
    folder.mkdir()
    head = {"lm_head.weight": state.pop("lm_head.weight")}
    files = {"pytorch_model-00001-of-00002.bin": state, "pytorch_model-00002-of-00002.bin": head}
    for name, content in files.items():
        torch.save(content, folder / name)
    index = {"metadata": {}, "weight_map": {k: name for name, content in files.items() for k in content}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config |= {"architectures": ["MobiLlamaForCausalLM"], "num_key_value_heads": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("form", ["expanded", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_import_export_is_bit_equal(
    form: Form, dtype: torch.dtype, weights: MemoryWeights, tokenizer: Path, tmp_path: Path
) -> None:
    weights.dtype = dtype
    export(weights, tmp_path / "one", form, tokenizer)
    model = ImportedModel(tmp_path / "one", recipe_of(tmp_path / "one", None))
    assert equal(model, weights)
    assert (model.step, model.samples, model.data_digest) == (weights.step, weights.samples, weights.data_digest)
    export(model, tmp_path / "two", form, tokenizer)

    def digest(name: str) -> str:
        return hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest()

    assert digest("one") == digest("two")


def test_dedicated_ffn(tokenizer: Path, tmp_path: Path) -> None:
    weights = MemoryWeights(small_recipe(name="large_base"))
    export(weights, tmp_path / "hf", "expanded", tokenizer)
    assert equal(ImportedModel(tmp_path / "hf", weights.recipe), weights)
    with pytest.raises(ConvertError, match=r"layers\.1\.mlp\.gate_proj\.weight differs from layer 0"):
        ImportedModel(tmp_path / "hf", small_recipe())


def test_published_form(published: Path, weights: MemoryWeights) -> None:
    with pytest.raises(ConvertError, match=r"--recipe recipes/mobillama_05b\.yaml"):
        recipe_of(published, None)
    assert equal(ImportedModel(published, small_recipe()), weights)


def test_published_form_in_one_aliased_file(published: Path, weights: MemoryWeights, tmp_path: Path) -> None:
    """As the chat model was saved: one `.bin`, all names, one storage for the FFN."""
    state: dict[str, torch.Tensor] = {}
    for file in published.glob("*.bin"):
        state |= torch.load(file, weights_only=True)
        file.unlink()
    (published / "pytorch_model.bin.index.json").unlink()
    for i in range(1, 3):
        for part in ("gate", "up", "down"):
            state[f"model.layers.{i}.mlp.{part}_proj.weight"] = state[f"model.layers.0.mlp.{part}_proj.weight"]
    torch.save(state, published / "pytorch_model.bin")
    assert equal(ImportedModel(published, small_recipe()), weights)


def test_safetensors_that_keep_only_layer_0s_copy(published: Path, weights: MemoryWeights, tmp_path: Path) -> None:
    """transformers 4 saved a shared module under its first name alone."""
    state = load_file(tmp_path / "ours" / "model.safetensors")
    state = {k: v for k, v in state.items() if ".mlp." not in k or ".layers.0." in k}
    save_file(state, tmp_path / "ours" / "model.safetensors")
    assert equal(ImportedModel(tmp_path / "ours", small_recipe()), weights)
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, tmp_path / "ours" / "model.safetensors")
    with pytest.raises(ConvertError, match=r"no tensor model\.layers\.0\.mlp\.up_proj\.weight"):
        ImportedModel(tmp_path / "ours", small_recipe())


def test_one_changed_bit_in_a_copy_is_refused(published: Path) -> None:
    file = published / "pytorch_model-00001-of-00002.bin"
    state = torch.load(file, weights_only=True)
    state["model.layers.2.mlp.up_proj.weight"].view(torch.int32)[7, 7] ^= 1
    torch.save(state, file)
    with pytest.raises(ConvertError, match=r"layers\.2\.mlp\.up_proj\.weight differs from layer 0"):
        ImportedModel(published, small_recipe())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    ("number", "name"), [(2, "lm_head.weight"), (1, "model.layers.0.mlp.up_proj.weight"), (1, "model.norm.weight")]
)
def test_values_that_are_not_finite_are_refused(value: float, number: int, name: str, published: Path) -> None:
    file = published / f"pytorch_model-0000{number}-of-00002.bin"
    state = torch.load(file, weights_only=True)
    state[name].view(-1)[5] = value
    torch.save(state, file)
    with pytest.raises(ConvertError, match=rf"{re.escape(f'{file}: {name}')} holds values that are not finite"):
        ImportedModel(published, small_recipe())


def test_grouped_kv_heads_are_refused(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConvertError, match="grouped KV heads"):
        ImportedModel(tmp_path, small_recipe(name="large_base"))


def test_a_config_of_another_model_is_refused(published: Path) -> None:
    with pytest.raises(ConvertError, match=r"rms_norm_eps is 1e-05, but .* 1e-06"):
        ImportedModel(published, small_recipe("use=paper_epsilon"))
    with pytest.raises(ConvertError, match=r"num_hidden_layers is 3, but .* 4"):
        ImportedModel(published, small_recipe("model.num_layers=4"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_theta": 500000.0}, r"base 500000; the recipe .* model\.rope_base 10000"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "with type 'linear'"),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, "base 500000"),
        ({"rope_theta": "large"}, "base 'large'; the recipe"),
        ({"rope_scaling": ["linear"]}, r"its rotary embedding is \['linear'\], not an object"),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
            },
            "with type 'llama3'",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_scaling": {"rope_theta": 5e5}},
            "with base 500000",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "with full_attention"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "with share of a head 0.5"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": 1}, "mlp_bias is 1"),
        ({"head_dim": 16}, "head_dim is 16, but the recipe"),
        ({"sliding_window": 128}, "sliding_window is 128; MobiLlama attends to the whole row"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types is"),
        ({"model_type": "granite"}, "model_type is 'granite'"),
        ({"model_type": None}, "model_type is None"),
        ({"architectures": ["MistralForCausalLM"]}, "architecture 'MistralForCausalLM' of a model of type llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture 'LlamaForSequenceClassification'"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}, "architecture 'OwnForCausalLM'"),
        ({"embedding_multiplier": 12.0, "residual_multiplier": 0.22}, "unknown keys 'embedding_multiplier', 'resid"),
        ({"attention_multiplier": 1.0}, "unknown key 'attention_multiplier'"),
        ({"final_logit_softcapping": 30.0}, "unknown key 'final_logit_softcapping'"),
        ({"use_qk_norm": True}, "unknown key 'use_qk_norm'"),
        ({"scale_depth": 1.4}, "unknown key 'scale_depth'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: fetch the weights that are not quantised"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', not true or false"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true, but lm_head.weight is not the embedding"),
    ],
)
def test_a_model_that_computes_otherwise_is_refused(change: dict[str, object], words: str, published: Path) -> None:
    """Its shapes are the recipe's, so that nothing else would tell."""
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConvertError, match=words):
        ImportedModel(published, small_recipe())


def test_what_is_of_no_consequence_is_read(published: Path, weights: MemoryWeights) -> None:
    shape = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4}
    (published / "config.json").write_text(json.dumps({**LLAMA_4, **shape, "rms_norm_eps": 1e-5}))
    assert equal(ImportedModel(published, small_recipe()), weights)


def test_frequencies_that_are_stored_are_those_of_the_recipe(published: Path) -> None:
    """Old LLaMA code takes them from the file, not from the configuration."""
    file = published / "pytorch_model-00001-of-00002.bin"
    state = torch.load(file, weights_only=True)
    state["model.layers.1.self_attn.rotary_emb.inv_freq"] /= 2
    torch.save(state, file)
    with pytest.raises(ConvertError, match=r"layers\.1\.self_attn\.rotary_emb\.inv_freq: not the frequencies of"):
        ImportedModel(published, small_recipe())


@pytest.mark.parametrize("form", ["expanded", "shared", "published"])
def test_logits_are_compared_with_those_of_transformers(
    form: str, published: Path, weights: MemoryWeights, tokenizer: Path, tmp_path: Path
) -> None:
    folder = published if form == "published" else tmp_path / form
    if form in ("expanded", "shared"):
        export(weights, folder, form, tokenizer)  # type: ignore[arg-type]
    model = ImportedModel(folder, weights.recipe)
    assert re.match(r"logits of 64 tokens: \d\.\de-0[5-9] \(relative\) from transformers 5", compare(model))
    if form != "expanded":
        return
    model.recipe = small_recipe("model.rope_base=9000")  # as if the configuration had passed for another's
    with pytest.raises(ConvertError, match=r"its logits of 64 tokens differ by .* computes otherwise"):
        compare(model)


def test_a_tied_folder_of_transformers_is_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    assert "lm_head.weight" not in load_file(tmp_path / "hf/model.safetensors")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(small_recipe(name="large_base").to_yaml())
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "ours"), "--recipe", str(recipe)]) == 0
    said = capsys.readouterr().err
    assert "(relative) from transformers" in said and "(expanded; tied: the head is a copy" in said
    with open_checkpoint(tmp_path / "ours") as ours:
        head, embedding = (ours.tensor(f"{name}.weight") for name in ("output_layer", "embedding.word_embeddings"))
    assert torch.equal(head, load_file(tmp_path / "hf/model.safetensors")["model.embed_tokens.weight"])
    assert torch.equal(head, embedding)

    said = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**said, "tie_word_embeddings": False}))
    with pytest.raises(ConvertError, match=r"no tensor lm_head\.weight"):
        ImportedModel(tmp_path / "hf", small_recipe(name="large_base"))


def test_a_tied_head_that_is_the_embedding_is_read(published: Path, weights: MemoryWeights) -> None:
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    embedding = weights.whole["embedding.word_embeddings.weight"]
    file = published / "pytorch_model-00002-of-00002.bin"
    torch.save({"lm_head.weight": embedding.clone()}, file)
    assert torch.equal(ImportedModel(published, small_recipe()).tensor("output_layer.weight"), embedding)


def test_what_transformers_5_writes_of_rotary_embedding_is_read(published: Path, weights: MemoryWeights) -> None:
    config = json.loads((published / "config.json").read_text())
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    (published / "config.json").write_text(json.dumps(config))
    assert equal(ImportedModel(published, small_recipe()), weights)


def test_precisions_of_the_file(published: Path, weights: MemoryWeights) -> None:
    """fp16 and a mixture become fp32; integers are no weights."""
    file = published / "pytorch_model-00001-of-00002.bin"
    state = torch.load(file, weights_only=True)
    half = {name: tensor.half() for name, tensor in state.items()}
    torch.save(half, file, _use_new_zipfile_serialization=False)  # as torch wrote before 1.6
    model = ImportedModel(published, small_recipe())
    assert model.recipe.precision == "fp32"
    assert torch.equal(model.tensor("final_layernorm.weight"), half["model.norm.weight"].float())

    head = published / "pytorch_model-00002-of-00002.bin"
    torch.save({"lm_head.weight": weights.whole["output_layer.weight"].bfloat16()}, head)
    model = ImportedModel(published, small_recipe())
    assert {model.tensor(name).dtype for name in weights.whole} == {torch.float32}

    torch.save({"lm_head.weight": weights.whole["output_layer.weight"].to(torch.int8)}, head)
    with pytest.raises(ConvertError, match=r"lm_head\.weight is torch\.int8; .* not quantised"):
        ImportedModel(published, small_recipe())
    torch.save([1, 2], head)
    with pytest.raises(ConvertError, match="holds list, not tensors by name"):
        ImportedModel(published, small_recipe())


class Explosive:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("exploded"),)


def test_pickled_objects_are_not_run(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"lm_head.weight": Explosive()}, published / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(ConvertError, match="without unpickling"):
        ImportedModel(published, small_recipe())
    (published / "pytorch_model-00002-of-00002.bin").write_bytes(pickle.dumps(Explosive()))
    with pytest.raises(ConvertError, match="without unpickling"):
        ImportedModel(published, small_recipe())
    assert not Path("exploded").exists()


def test_damaged_folders_are_refused(published: Path, weights: MemoryWeights, tmp_path: Path) -> None:
    recipe = small_recipe()
    ours = tmp_path / "ours"
    whole = (ours / "model.safetensors").read_bytes()
    (ours / "model.safetensors").write_bytes(whole[:-5])
    with pytest.raises(ConvertError, match="not safetensors"):
        ImportedModel(ours, recipe)
    (ours / "model.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"none of model\.safetensors"):
        ImportedModel(ours, recipe)
    index = published / "pytorch_model.bin.index.json"
    entries = json.loads(index.read_text())
    shutil.copy(published / entries["weight_map"]["model.norm.weight"], published.parent / "elsewhere.bin")
    entries["weight_map"]["model.norm.weight"] = "../elsewhere.bin"  # whole, but not of this folder
    index.write_text(json.dumps(entries))
    with pytest.raises(ConvertError, match=r"names '\.\./elsewhere\.bin', which is no file of the folder"):
        ImportedModel(published, recipe)
    for weight_map, words in (({"model.norm.weight": 3}, "names 3, which"), ([1], "names no files"), ({}, "no files")):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ConvertError, match=words):
            ImportedModel(published, recipe)
    index.write_text("{")
    with pytest.raises(ConvertError, match="not JSON"):
        ImportedModel(published, recipe)
    (published / "config.json").unlink()
    with pytest.raises(ConvertError, match=r"no config\.json"):
        ImportedModel(published, recipe)
