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

from megatron_patch.convert.export import export
from megatron_patch.convert.imported import ImportedModel, recipe_of
from megatron_patch.convert.names import Form
from megatron_patch.convert.source import ConvertError
from tests.convert.samples import MemoryWeights, small_recipe


def equal(model: ImportedModel, weights: MemoryWeights) -> bool:
    return all(torch.equal(model.tensor(name), tensor) for name, tensor in weights.whole.items())


@pytest.fixture
def published(weights: MemoryWeights, tokenizer: Path, tmp_path: Path) -> Path:
    """The authors' layout: 22 equal FFN copies in two fp32 `.bin` files, buffers included, KV heads misstated."""
    export(weights, tmp_path / "ours", "expanded", tokenizer)
    state = {k: v.clone() for k, v in load_file(tmp_path / "ours" / "model.safetensors").items()}
    state |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
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
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "of type linear"),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, "base 500000"),
        ({"rope_theta": "large"}, "base 'large'; the recipe"),
        ({"rope_scaling": ["linear"]}, r"its rotary embedding is \['linear'\], not an object"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true, but lm_head.weight is not the embedding"),
    ],
)
def test_a_model_that_computes_otherwise_is_refused(change: dict[str, object], words: str, published: Path) -> None:
    """Its shapes are the recipe's, so that nothing else would tell."""
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConvertError, match=words):
        ImportedModel(published, small_recipe())


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
