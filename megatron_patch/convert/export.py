"""A checkpoint as a Hugging Face folder.

    expanded    stock `LlamaForCausalLM`, the shared FFN copied into every layer; of a model that sees stock
                `LlavaForConditionalGeneration` (llava.py)
    shared      one FFN, with the small modelling file that `trust_remote_code=True` loads

Runs on one process without a GPU, whatever layout wrote the checkpoint: one shard is in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer

from data_tools.dataset.format import tokenizer_in
from data_tools.files.durable import fsync_file, fsync_folder, new_folder, share_like_folder, take_place
from data_tools.sources.text_encoder import EOS_TEXT, read_tokenizer_json
from megatron_patch.convert.chat_files import chat_beside
from megatron_patch.convert.llava import WithLastNorm, llava_config, llava_tensors, processor_files
from megatron_patch.convert.model_card import model_card
from megatron_patch.convert.names import Form, HfTensor, ffn_table, hf_tensors
from megatron_patch.convert.source import ConvertError, WeightsSource
from megatron_patch.recipe import Model, Recipe

SHARD_BYTES = 500_000_000
TOKENIZER_CLASS = "PreTrainedTokenizerFast"
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BOS_TEXT, UNK_TEXT = "<s>", "<unk>"
MODELING_FILE = Path(__file__).with_name("modeling_mobillama.py")
PROVENANCE_NAME = "provenance.json"


class ControlIds(NamedTuple):
    """Ids of LLaMA's control tokens in a tokenizer; pre-training saw `</s>` alone.

    `eos` ends a document, or a chat model's turn. `unk` pads batches: no text gives it.
    """

    bos: int | None
    eos: int
    unk: int | None


def export(
    source: WeightsSource,
    folder: Path,
    form: Form,
    tokenizer: Path,
    scores: dict[str, Any] | None = None,
    dtype: str | None = None,
    energy: str | None = None,
) -> None:
    """Writes `folder`: safetensors shards with their index, config, tokenizer, recipe, provenance and model card.

    The folder appears whole or not at all. `tokenizer` is a tokenizer.model or tokenizer.json, `scores` what `eval`
    wrote of this checkpoint and `energy` what its training drew, for the model card. Weights keep the source's dtype,
    or are rounded to `dtype` (`bf16`, `fp16`, `fp32`).

    Raises:
        ConvertError: `folder` exists, the form does not exist for this model, weights are not finite or
            beyond `dtype`, the disk is full.
        DataError: the tokenizer cannot be read, or another process exports to `folder`.
    """
    if folder.exists():
        raise ConvertError(f"{folder}: exists; choose a new folder or remove this one")
    try:
        if form == "expanded" and source.recipe.model.vision is not None:
            tensors, source = llava_tensors(source.recipe.model), WithLastNorm(source)
        else:
            tensors = hf_tensors(source.recipe.model, form)
    except ConvertError:
        raise
    except ValueError as error:
        raise ConvertError(f"--form {form}: {error}") from None
    partial = folder.with_name(folder.name + ".partial")
    try:
        with new_folder(folder, partial):
            _write(source, partial, form, tensors, tokenizer, scores, dtype, energy)
            for file in partial.iterdir():
                fsync_file(file)
            fsync_folder(partial)
            take_place(partial, folder)
    except (OSError, SafetensorError) as error:  # which names no file where the disk is full
        raise ConvertError(f"{folder}: cannot be written ({error}); free space, or name another") from None
    fsync_folder(folder.parent)


def _write(
    source: WeightsSource,
    folder: Path,
    form: Form,
    tensors: list[HfTensor],
    tokenizer: Path,
    scores: dict[str, Any] | None,
    dtype_named: str | None,
    energy: str | None,
) -> None:
    ids = write_tokenizer(tokenizer, folder, source.recipe.model)
    dtype = _DTYPES[dtype_named] if dtype_named else source.tensor(tensors[-1].whole).dtype
    _write_shards(source, tensors, folder, dtype)
    config = hf_config(source.recipe.model, form, dtype, ids)
    if source.recipe.model.vision is not None:
        config = llava_config(source.recipe.model, config)
        for name, content in processor_files(source.recipe.model, folder / "tokenizer.json").items():
            write_json(folder / name, content)
    write_json(folder / "config.json", config)
    generation = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.unk, "do_sample": False}
    write_json(folder / "generation_config.json", generation)
    if form == "shared":
        shutil.copyfile(MODELING_FILE, folder / MODELING_FILE.name)
    write_json(folder / PROVENANCE_NAME, provenance(source, form))
    (folder / "recipe.yaml").write_text(source.recipe.to_yaml(), encoding="utf-8")
    (folder / "README.md").write_text(model_card(source, form, scores, energy), encoding="utf-8")


def hf_config(model: Model, form: Form, dtype: torch.dtype, ids: ControlIds) -> dict[str, Any]:
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
        "tokenizer_class": TOKENIZER_CLASS,  # pipelines of transformers 4 load none for a model type they do not know
        "shared_ffn": model.shared_ffn,
        **({} if (table := ffn_table(model)) is None else {"ffn_of_layer": table}),
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
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
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


def write_tokenizer(tokenizer: Path, folder: Path, model: Model) -> ControlIds:
    """The tokenizer's files, adding neither BOS nor EOS to a text, as in training.

    Of a tokenizer that lies in a data set of conversations with their template; EOS is then the end of a turn.

    Raises:
        ConvertError: it has more ids than the model's vocabulary, or no `</s>`.
        DataError: it cannot be read.
    """
    text = read_tokenizer_json(tokenizer)
    try:
        read = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare ones
        raise ConvertError(f"{tokenizer}: not a tokenizer ({error}); give LLaMA's") from None
    if (size := read.get_vocab_size()) > model.vocab_size:
        raise ConvertError(f"{tokenizer}: {size} ids, but the model has {model.vocab_size}; name its own tokenizer")
    chat = chat_beside(tokenizer)
    eos_text = chat.end_of_turn if chat else EOS_TEXT
    bos, eos, unk = (read.token_to_id(token) for token in (BOS_TEXT, eos_text, UNK_TEXT))
    if eos is None:
        raise ConvertError(f"{tokenizer}: no token {eos_text}, which ends each text in training; give LLaMA's")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    if tokenizer.suffix == ".model":
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
    named = {"bos_token": BOS_TEXT, "eos_token": eos_text, "unk_token": UNK_TEXT, "pad_token": UNK_TEXT}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": TOKENIZER_CLASS,
            "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 else adds one that generate refuses
            "add_bos_token": False,
            "add_eos_token": False,
            **{role: token for role, token in named.items() if read.token_to_id(token) is not None},
            **({"chat_template": chat.template} if chat else {}),
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.sequence_length,
        },
    )
    return ControlIds(bos, eos, unk)


def _write_shards(source: WeightsSource, tensors: list[HfTensor], folder: Path, dtype: torch.dtype) -> None:
    element = torch.empty((), dtype=dtype).element_size()
    shards = _shards(tensors, element)
    weight_map, total = {}, 0
    wholes: dict[str, torch.Tensor] = {}
    last_use = {tensor.whole: tensor.name for tensor in tensors}  # q, k and v are cut from one, copies of an FFN too
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        content = {}
        for tensor in shard:
            if tensor.whole not in wholes:
                wholes[tensor.whole] = source.tensor(tensor.whole)
            content[tensor.name] = _rounded(tensor, wholes[tensor.whole], source, dtype)
            if last_use[tensor.whole] == tensor.name:
                del wholes[tensor.whole]
            weight_map[tensor.name] = name
            total += content[tensor.name].numel() * element
        save_file(content, folder / name, metadata={"format": "pt"})
        share_like_folder(folder / name)
    if len(shards) > 1:
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _rounded(tensor: HfTensor, whole: torch.Tensor, source: WeightsSource, dtype: torch.dtype) -> torch.Tensor:
    """A copy, also in the same dtype: safetensors refuses tensors that share memory."""
    values = tensor.cut(whole, source.recipe.model)
    stored = values.to(dtype, copy=True)
    if not stored.isfinite().all():
        if values.isfinite().all():
            raise ConvertError(
                f"{tensor.name}: holds {values.abs().max():.6g}, beyond the {torch.finfo(dtype).max:,.6g} of {dtype}; "
                "choose another --dtype"
            )
        raise ConvertError(
            f"{tensor.whole}: holds values that are not finite; the training went wrong before step "
            f"{source.step:,}: export an earlier checkpoint"
        )
    return stored


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


def provenance(source: WeightsSource, form: str) -> dict[str, Any]:
    """What an export records of where its weights come from; `import` reads it back."""
    return {
        "form": form,
        "recipe": source.recipe.name,
        "step": source.step,
        "samples": source.samples,
        "tokens": source.tokens,
        "checkpoint_digest": source.digest,
        "data_digest": source.data_digest,
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
