"""`python -m megatron_patch export`: a checkpoint as a Hugging Face folder.

    CHECKPOINT --form expanded    stock `LlamaForCausalLM`, the shared FFN copied into every layer
    CHECKPOINT --form shared      one FFN, with the small modelling file that `trust_remote_code=True` loads

Runs on one process without a GPU, whatever layout wrote the checkpoint: one shard is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from data_tools.durable import fsync_folder
from data_tools.format import tokenizer_in
from data_tools.text_encoder import read_tokenizer_json
from megatron_patch.convert.names import Form, HfTensor, hf_tensors
from megatron_patch.convert.source import ConvertError, WeightsSource
from megatron_patch.counts import parameters
from megatron_patch.recipe import Model, Recipe

SHARD_BYTES = 500_000_000
BOS_ID, EOS_ID = 1, 2  # <s> and </s> of LLaMA's tokenizer; training saw no <s>
MODELING_FILE = Path(__file__).with_name("modeling_mobillama.py")
PROVENANCE_NAME = "provenance.json"


def export(source: WeightsSource, folder: Path, form: Form, tokenizer: Path) -> None:
    """Writes `folder`: safetensors shards with their index, config, tokenizer, recipe, provenance and model card.

    The folder appears whole or not at all. `tokenizer` is a tokenizer.model or tokenizer.json. Weights keep the
    source's dtype.

    Raises:
        ConvertError: `folder` exists, or the form does not exist for this model.
        DataError: the tokenizer cannot be read.
    """
    if folder.exists():
        raise ConvertError(f"{folder}: exists; choose a new folder or remove this one")
    try:
        tensors = hf_tensors(source.recipe.model, form)
    except ValueError as error:
        raise ConvertError(f"--form {form}: {error}") from None
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write(source, partial, form, tensors, tokenizer)
        fsync_folder(partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    fsync_folder(folder.parent)


def _write(source: WeightsSource, folder: Path, form: Form, tensors: list[HfTensor], tokenizer: Path) -> None:
    write_tokenizer(tokenizer, folder, source.recipe.model)
    dtype = _write_shards(source, tensors, folder)
    _write_json(folder / "config.json", hf_config(source.recipe.model, form, dtype))
    _write_json(folder / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False})
    if form == "shared":
        shutil.copyfile(MODELING_FILE, folder / MODELING_FILE.name)
    provenance = _provenance(source, form)
    _write_json(folder / PROVENANCE_NAME, provenance)
    (folder / "recipe.yaml").write_text(source.recipe.to_yaml())
    (folder / "README.md").write_text(_model_card(source, form, provenance))


def hf_config(model: Model, form: Form, dtype: torch.dtype) -> dict[str, Any]:
    """`config.json`. States every KV head: the released configurations' 4 is wrong (docs/errata.md)."""
    architecture: dict[Form, dict[str, Any]] = {
        "expanded": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        "shared": {
            "architectures": ["MobiLlamaForCausalLM"],
            "model_type": "mobillama",
            "auto_map": {
                "AutoConfig": f"{MODELING_FILE.stem}.MobiLlamaConfig",
                "AutoModel": f"{MODELING_FILE.stem}.MobiLlamaModel",
                "AutoModelForCausalLM": f"{MODELING_FILE.stem}.MobiLlamaForCausalLM",
            },
        },
    }
    return {
        **architecture[form],
        "shared_ffn": model.shared_ffn,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_attention_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.sequence_length,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_base,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def tokenizer_of(recipe: Recipe) -> Path:
    """The tokenizer of the data set that the recipe trains on. Raises ConvertError where it is not there."""
    folder = recipe.data.folder
    found = tokenizer_in(folder) if folder else None
    if found is None:
        raise ConvertError(
            f"{folder or 'data.folder'}: no tokenizer with the training data; name it with --tokenizer tokenizer.model"
        )
    return found


def write_tokenizer(tokenizer: Path, folder: Path, model: Model) -> None:
    """The tokenizer's files, adding neither BOS nor EOS to a text, as in training.

    Raises:
        ConvertError: it has more ids than the model's vocabulary.
        DataError: it cannot be read.
    """
    text = read_tokenizer_json(tokenizer)
    size = Tokenizer.from_str(text).get_vocab_size()
    if size > model.vocab_size:
        raise ConvertError(f"{tokenizer}: {size} ids, but the model has {model.vocab_size}; name its own tokenizer")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    if tokenizer.suffix == ".model":
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.sequence_length,
        },
    )


def _write_shards(source: WeightsSource, tensors: list[HfTensor], folder: Path) -> torch.dtype:
    model = source.recipe.model
    dtype = source.tensor(tensors[-1].whole).dtype
    element = torch.empty((), dtype=dtype).element_size()
    shards = _shards(tensors, element)
    weight_map, total = {}, 0
    wholes: dict[str, torch.Tensor] = {}  # q, k and v lie side by side, and copies of the FFN in one shard
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content = {}
        for tensor in shard:
            if tensor.whole not in wholes:
                wholes = {k: v for k, v in wholes.items() if k.startswith("ffn.")}
                wholes[tensor.whole] = source.tensor(tensor.whole)
            # A copy each: safetensors refuses tensors that share memory.
            content[tensor.name] = tensor.cut(wholes[tensor.whole], model).clone()
            weight_map[tensor.name] = name
            total += content[tensor.name].numel() * element
        save_file(content, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return dtype


def _shards(tensors: list[HfTensor], element_size: int) -> list[list[HfTensor]]:
    shards: list[list[HfTensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = torch.Size(tensor.shape).numel() * element_size
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def _provenance(source: WeightsSource, form: Form) -> dict[str, Any]:
    return {
        "form": form,
        "recipe": source.recipe.name,
        "step": source.step,
        "samples": source.samples,
        "tokens": source.tokens,
        "checkpoint_digest": source.digest,
        "data_digest": source.data_digest,
    }


def _model_card(source: WeightsSource, form: Form, provenance: dict[str, Any]) -> str:
    model = source.recipe.model
    load = {
        "expanded": 'AutoModelForCausalLM.from_pretrained("FOLDER")',
        "shared": 'AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)',
    }[form]
    sharing = {
        (True, "expanded"): f"One FFN was trained for all {model.num_layers} layers; it stands here in every layer, so "
        "that stock LLaMA code loads it.",
        (True, "shared"): f"One FFN for all {model.num_layers} layers, stored once.",
        (False, "expanded"): "Each layer has an FFN of its own.",
    }[model.shared_ffn, form]
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in _card_rows(source, provenance))
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [mobillama]
---
# {source.recipe.name}

A MobiLlama model (arXiv 2402.16840). {sharing}

| | |
|---|---|
{rows}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = {load}
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

Texts are given without `<s>`: training put `</s>` after each document and nothing before it.
The resolved recipe is in `recipe.yaml`.
"""


def _card_rows(source: WeightsSource, provenance: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    model = source.recipe.model
    yield "parameters", f"{parameters(model).unique:,}"
    yield "layers x hidden / FFN", f"{model.num_layers} x {model.hidden_size} / {model.ffn_hidden_size}"
    yield "attention", f"{model.num_attention_heads} heads, as many KV heads"
    for key in ("recipe", "step", "samples", "tokens", "checkpoint_digest", "data_digest"):
        value = provenance[key]
        yield key, f"{value:,}" if isinstance(value, int) else ("unknown" if value is None else value)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main(args: argparse.Namespace) -> int:
    """Exit code 2: refused, with the remedy."""
    from megatron_patch.train.checkpoint.reader import open_checkpoint

    try:
        if (args.checkpoint / "checkpoints").is_dir():
            raise ConvertError(
                f"{args.checkpoint}: a run; name one of the checkpoints in {args.checkpoint}/checkpoints"
            )
        with open_checkpoint(args.checkpoint) as checkpoint:
            export(checkpoint, args.folder, args.form, args.tokenizer or tokenizer_of(checkpoint.recipe))
    except ValueError as error:  # ConvertError, CheckpointError, DataError
        print(f"refused: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: written ({args.form})", file=sys.stderr)
    return 0
