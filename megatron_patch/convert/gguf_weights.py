"""A GGUF file of llama.cpp's `llama` as the tensors and configuration of a Hugging Face folder.

Each key is judged as those of a `config.json` are (`convert/architecture.py`): it says what the recipe can be held to,
or has the value with which it changes nothing, or is known to be of no consequence; another is refused by name.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from data_tools.files.digest import digest_file
from megatron_patch.convert.architecture import is_one_of
from megatron_patch.convert.gguf_file import PROVENANCE_KEY, RECIPE_KEY
from megatron_patch.convert.gguf_reader import BoundedReader
from megatron_patch.convert.source import MOST_PROVENANCE, ConvertError
from megatron_patch.recipe import Recipe, from_text

_IN_LAYER = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
_HF_NAMES = {
    _NAMES.get_name(name): name
    for name in ("model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.0.{name}" for name in _IN_LAYER))
}
"""llama.cpp's names of the tensors of `llama` (of its layers the first) to Hugging Face's, by the library's own map."""

_CONFIG = {
    "llama.vocab_size": "vocab_size",
    "llama.embedding_length": "hidden_size",
    "llama.feed_forward_length": "intermediate_size",
    "llama.block_count": "num_hidden_layers",
    "llama.attention.head_count": "num_attention_heads",
    "llama.attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "llama.rope.freq_base": "rope_theta",
    "llama.context_length": "max_position_embeddings",
}
_REAL = ("llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base")
_OF_A_HEAD = ("llama.rope.dimension_count", "llama.attention.key_length", "llama.attention.value_length")
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "general.type": ("model",),
    "general.quantization_version": (gguf.GGML_QUANT_VERSION,),
    "llama.attention.causal": (True,),
    "llama.attention.clamp_kqv": (0,),
    "llama.attention.max_alibi_bias": (0,),
    "llama.attention.sliding_window": (0,),
    "llama.expert_count": (0,),
    "llama.expert_used_count": (0,),
    "llama.rope.scaling.attn_factor": (1,),
    "llama.rope.scaling.factor": (0, 1),
    "llama.rope.scaling.finetuned": (False,),
    "llama.rope.scaling.type": ("none",),
    "llama.tensor_data_layout": ("Meta AI original pth",),  # rows of q and k as neighbours are rotated: always so here
    "llama.use_parallel_residual": (False,),
    "split.count": (0, 1),
    "split.no": (0,),
}
_OF_NO_CONSEQUENCE = ("general.", "tokenizer.", "quantize.", "split.tensors.count", "GGUF.", RECIPE_KEY, PROVENANCE_KEY)
"""Beginnings: names and licences, the tokenizer, how it was quantized, what the reader says itself, and ours."""

_KINDS = (
    GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0
)  # fmt: skip


class GgufWeights:
    """Tensors of a GGUF file by Hugging Face's names, as `HfFolder` gives those of a folder.

    Attributes:
        path: the file.
        config_file: what holds `config`: the file too.
        config: what a config.json would say.
        files: tensor name -> the file.
        rounded: the quantization of its matrices; None where none is quantized.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConvertError where it is no GGUF file, is damaged, or says what changes the arithmetic."""
        self.path = self.config_file = path
        try:
            if not path.is_file():  # a pipe would be waited for
                raise ValueError("no plain file" if path.exists() else "no such file")
            reader = BoundedReader(path)
            self._values = {name: _value(field) for name, field in reader.fields.items()}
        except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
            raise ConvertError(f"{path}: no GGUF file, or damaged ({error}); fetch it again") from None
        self._tensors = {_hf_name(tensor.name, path): tensor for tensor in reader.tensors}
        self.files = dict.fromkeys(self._tensors, path)
        self.config = self._judged()
        kinds = {tensor.tensor_type for tensor in reader.tensors if len(tensor.shape) > 1}
        self._is_bf16 = kinds == {GGMLQuantizationType.BF16}
        self.rounded = "Q8_0" if GGMLQuantizationType.Q8_0 in kinds else None

    @cached_property
    def digest(self) -> str:
        """XXH3-128 over the file's bytes."""
        return digest_file(self.path)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name, on the CPU. Raises ConvertError where the file has none, or a rounded one."""
        if name not in self._tensors:
            raise ConvertError(f"{self.path}: no tensor {name} in its weights; the file is incomplete")
        found = self._tensors[name]
        if found.tensor_type not in _KINDS:
            raise ConvertError(
                f"{self.path}: {found.name} is {found.tensor_type.name}, too far from what was trained; fetch the "
                f"file in {', '.join(kind.name for kind in _KINDS)}"
            )
        if found.tensor_type is GGMLQuantizationType.BF16:
            values = torch.from_numpy(np.array(found.data)).view(torch.bfloat16)
        elif found.tensor_type is GGMLQuantizationType.Q8_0:
            values = torch.from_numpy(dequantize(found.data, found.tensor_type))
        else:
            values = torch.from_numpy(np.array(found.data))
        if self._is_bf16 and values.ndim == 1:  # norms are stored in fp32, whatever they were trained in
            narrow = values.bfloat16()
            return narrow if torch.equal(narrow.float(), values) else values
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            return _halved(values, self.config["num_attention_heads"])
        return values

    def recipe(self) -> Recipe | None:
        """The recipe that `export` left in the file. Raises RecipeError where it is none that can be run."""
        text = self._values.get(RECIPE_KEY)
        return from_text(str(text), Path(f"{self.path} ({RECIPE_KEY})")) if text is not None else None

    @property
    def provenance_place(self) -> str:
        return f"{self.path} ({PROVENANCE_KEY})"

    def provenance(self) -> bytes | None:
        """The JSON that `export` recorded; None where it did not. Raises ValueError."""
        text = self._values.get(PROVENANCE_KEY)
        content = None if text is None else str(text).encode()
        if content is not None and len(content) > MOST_PROVENANCE:
            raise ValueError(f"more than {MOST_PROVENANCE:,} bytes")
        return content

    def _judged(self) -> dict[str, Any]:
        values = self._values
        if values.get("general.architecture") != "llama":
            raise ConvertError(
                f"{self.path}: general.architecture is {_shown(values.get('general.architecture'))}; llama is "
                "imported, others compute otherwise"
            )
        config = {ours: values[key] for key, ours in _CONFIG.items() if key in values}
        if "model.embed_tokens.weight" in self._tensors:  # where the key is not there, llama.cpp counts
            config.setdefault("vocab_size", int(self._tensors["model.embed_tokens.weight"].shape[-1]))
        for key in _CONFIG:
            kind = float if key in _REAL else int
            if key in values and not (type(values[key]) is kind and 0 < values[key] < 2**31):
                raise ConvertError(f"{self.path}: {key} is {_shown(values[key])}, no model's; fetch it again")
        heads, width = config.get("num_attention_heads", 0), config.get("hidden_size", 0)
        if not heads or width % heads:
            raise ConvertError(
                f"{self.path}: llama.attention.head_count is {heads}, llama.embedding_length {width}: no model's; "
                "fetch it again"
            )
        expected = {
            **_WITHOUT_EFFECT,
            "llama.attention.head_count_kv": (heads,),
            **dict.fromkeys(_OF_A_HEAD, (width // heads,)),
        }
        for key, value in values.items():
            if key in expected:
                if not is_one_of(value, expected[key]):
                    raise ConvertError(
                        f"{self.path}: {key} is {_shown(value)}, which computes otherwise than MobiLlama "
                        f"({' or '.join(map(repr, expected[key]))}); it cannot be imported"
                    )
            elif key not in _CONFIG and key != "general.architecture" and not key.startswith(_OF_NO_CONSEQUENCE):
                raise ConvertError(
                    f"{self.path}: unknown key {_shown(key)}, which may change what is computed; it cannot be imported"
                )
        tied = "lm_head.weight" not in self._tensors
        return {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": heads,
            "tie_word_embeddings": tied, **config,
        }  # fmt: skip


def _value(field: Any) -> Any:
    """A key's value; of an array its kind alone, a number in fp32 as the shortest decimal that it stands for."""
    if field.types[0] is gguf.GGUFValueType.ARRAY:
        return f"an array of {field.types[1].name}"
    value = field.contents()
    return float(str(np.float32(value))) if field.types[0] is gguf.GGUFValueType.FLOAT32 else value


def _hf_name(name: str, file: Path) -> str:
    layer = re.match(r"blk\.(0|[1-9][0-9]{0,4})\.", name)
    first = f"blk.0.{name[layer.end() :]}" if layer else name
    known = _HF_NAMES.get(first.removesuffix(".weight")) if first.endswith(".weight") else None
    if known is None:
        raise ConvertError(f"{file}: unknown tensor {_shown(name)}; not a MobiLlama or LLaMA model")
    return (known.replace(".0.", f".{layer[1]}.", 1) if layer else known) + ".weight"


def _halved(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as Hugging Face rotates them, by halves of a head; of a wrong shape as they are."""
    if values.ndim != 2 or len(values) % (2 * heads):
        return values
    return values.view(heads, -1, 2, values.shape[-1]).transpose(1, 2).reshape(values.shape)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
