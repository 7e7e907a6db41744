"""Which files of a Hugging Face folder are read, and values that transformers itself cannot take."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_patch.convert.export import export
from megatron_patch.convert.forward import compare
from megatron_patch.convert.imported import ImportedModel
from megatron_patch.convert.source import ConvertError
from tests.convert.samples import MemoryWeights, small_recipe


@pytest.fixture
def folder(weights: MemoryWeights, tokenizer: Path, tmp_path: Path) -> Path:
    export(weights, tmp_path / "hf", "expanded", tokenizer)
    return tmp_path / "hf"


def shard(folder: Path, *extra: str) -> None:
    """The weights in two files with an index, which does not name the `extra` tensors of the second."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first = {name for name in state if "layers.0." in name}
    parts = {"a.safetensors": first, "b.safetensors": set(state) - first}
    weight_map = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    state |= {name: torch.full((8,), 3.0) for name in extra}
    parts["b.safetensors"] |= set(extra)
    for file, names in parts.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})


def test_of_several_forms_the_one_is_read_that_transformers_reads(
    folder: Path, weights: MemoryWeights, tmp_path: Path
) -> None:
    """Left over from an older upload, say: what they hold is not what anyone runs."""
    shutil.copytree(folder, tmp_path / "sharded")
    shard(tmp_path / "sharded")
    state = {name: tensor * 1.5 for name, tensor in load_file(folder / "model.safetensors").items()}
    for stale in (folder, tmp_path / "sharded"):
        torch.save(state, stale / "pytorch_model.bin")
        torch.save(state, stale / "stale.bin")
        index = {"weight_map": dict.fromkeys(state, "stale.bin")}
        (stale / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for name in ("a.safetensors", "b.safetensors"):
        save_file(state, folder / name)
    shutil.copy(tmp_path / "sharded/model.safetensors.index.json", folder)
    for found in (folder, tmp_path / "sharded"):
        model = ImportedModel(found, small_recipe())
        assert all(torch.equal(model.tensor(name), tensor) for name, tensor in weights.whole.items())


def test_tensors_that_an_index_hides_are_judged(folder: Path) -> None:
    shard(folder, "model.layers.1.self_attn.q_norm.weight")
    with pytest.raises(ConvertError, match=r"unknown tensors, e\.g\. model\.layers\.1\.self_attn\.q_norm\.weight"):
        ImportedModel(folder, small_recipe())


def test_a_tensor_that_two_shards_hold_is_refused(folder: Path) -> None:
    """transformers reads the last file's, whatever the index says."""
    shard(folder)
    first = load_file(folder / "a.safetensors")
    twice = {**load_file(folder / "b.safetensors"), min(first): first[min(first)] + 1}
    save_file(twice, folder / "b.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConvertError, match=rf"b\.safetensors: holds {min(first)}, and so does a\.safetensors"):
        ImportedModel(folder, small_recipe())


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda t: t.to_sparse(), "sparse_coo"), (lambda t: t.to_sparse_csr(), "sparse_csr"),
     (lambda t: t.to("meta"), "without values")],
)  # fmt: skip
def test_tensors_of_other_making_are_named(
    change: Callable[[torch.Tensor], torch.Tensor], words: str, folder: Path
) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**state, 3: torch.zeros(2)}, folder / "pytorch_model.bin")  # an optimizer's, say; transformers too
    assert compare(ImportedModel(folder, small_recipe())).startswith("logits of 64 tokens: ")
    state["lm_head.weight"] = change(state["lm_head.weight"])
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ConvertError, match=rf"pytorch_model\.bin: lm_head\.weight is .*{words}, not a plain tensor"):
        ImportedModel(folder, small_recipe())


def test_a_shard_that_is_a_pointer_of_git_lfs_is_to_be_fetched(folder: Path) -> None:
    shard(folder)
    (folder / "b.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 123\n")
    with pytest.raises(ConvertError, match=r"b\.safetensors: not safetensors .*; fetch the file again"):
        ImportedModel(folder, small_recipe())


def test_an_adapter_beside_the_weights_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConvertError, match=r"adapter_config\.json: transformers would add this adapter"):
        ImportedModel(folder, small_recipe())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"pretraining_tp": "two"}, "pretraining_tp"),
        ({"id2label": 5}, "'int' object has no attribute 'items'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_transformers_cannot_take_is_no_traceback(change: dict[str, object], words: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConvertError, match=rf"config\.json: transformers 5\S+ cannot build the model \(.*{words}"):
        compare(ImportedModel(folder, small_recipe()))


def test_what_changes_no_logits_is_read(folder: Path) -> None:
    """An id of padding that only a tokenizer knows, and how results are handed over."""
    config = json.loads((folder / "config.json").read_text())
    change = {"pad_token_id": config["vocab_size"], "return_dict": False}
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert compare(ImportedModel(folder, small_recipe())).startswith("logits of 64 tokens: ")


def test_weights_of_zeros_are_damaged_and_no_other_arithmetic(folder: Path) -> None:
    state = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConvertError, match=r"logits that are zero or not finite; the weights are damaged"):
        compare(ImportedModel(folder, small_recipe()))
