"""Hugging Face's names for the model's tensors, and how each is cut out of a whole-model tensor.

Whole-model tensors are those of `megatron_patch.model.parameters`. Hugging Face's LLaMA keeps q, k and v apart where
Megatron-Core stacks them head by head, and gate and up apart where it stacks them. Both rotate halves of a head
(NeoX style), so no row of q or k changes place within its head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_patch.kernels.packed_qkv import pack_weights, part_of_weight
from megatron_patch.model.parameters import ffn_prefix, ffn_prefixes
from megatron_patch.recipe import Model

Form = Literal["expanded", "shared"]
"""expanded: an FFN in every layer, as stock `LlamaForCausalLM` has it; shared: each FFN once, as it was trained."""

_ATTENTION = ("q_proj", "k_proj", "v_proj")
_FFN = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class HfTensor:
    """A tensor of the Hugging Face model.

    Attributes:
        name: e.g. `model.layers.0.self_attn.q_proj.weight`.
        shape: its shape.
        whole: the whole-model tensor it is cut from.
        part: which part of it (q, k, v are 0, 1, 2; gate, up are 0, 1); None: all of it.
    """

    name: str
    shape: tuple[int, ...]
    whole: str
    part: int | None

    def cut(self, whole: torch.Tensor, model: Model) -> torch.Tensor:
        """This tensor out of the whole-model tensor, contiguous."""
        if self.part is None:
            return whole.contiguous()
        if self.whole.endswith("linear_qkv.weight"):
            return part_of_weight(whole, self.part, model.num_attention_heads).reshape(self.shape)
        return whole[self.part].contiguous()


def ffn_table(model: Model) -> list[int] | None:
    """Which FFN each layer uses, from 0, of a model with several that layers share; None of others."""
    if not model.shared_ffn or model.ffn_count == 1:
        return None
    return [model.ffn_of(layer) for layer in range(model.num_layers)]


def hf_tensors(model: Model, form: Form) -> list[HfTensor]:
    """Every tensor of the Hugging Face model in forward order.

    A shared FFN stands `num_layers` times in the expanded form (223 - 22 = 201 tensors at 22 layers) and once in the
    shared form (138 tensors), where several are `model.ffns.K` and one is `model.ffn`.

    Raises:
        ValueError: the shared form of a model whose layers have an FFN each; a model that sees (convert/llava.py).
    """
    if model.vision is not None:
        raise ValueError(
            "this form reads alone, and the model's encoder would be left out without a word; a model that sees is "
            "exported with --form expanded, for stock LlavaForConditionalGeneration"
        )
    if form == "shared" and not model.shared_ffn:
        raise ValueError("every layer has an FFN of its own (model.num_ffns), so only `expanded` exists")
    h, f, v = model.hidden_size, model.ffn_hidden_size, model.vocab_size

    def ffn(prefix: str, whole: str) -> list[HfTensor]:
        return [
            *(HfTensor(f"{prefix}.{n}.weight", (f, h), f"{whole}.linear_fc1.weight", i) for i, n in enumerate(_FFN)),
            HfTensor(f"{prefix}.down_proj.weight", (h, f), f"{whole}.linear_fc2.weight", None),
        ]

    tensors = [HfTensor("model.embed_tokens.weight", (v, h), "embedding.word_embeddings.weight", None)]
    if form == "shared":
        tensors += [t for prefix in ffn_prefixes(model) for t in ffn(f"model.{prefix}", prefix)]
    for i in range(model.num_layers):
        layer, ours = f"model.layers.{i}", f"layers.{i}"
        tensors += [
            HfTensor(f"{layer}.input_layernorm.weight", (h,), f"{ours}.input_layernorm.weight", None),
            *(
                HfTensor(f"{layer}.self_attn.{n}.weight", (h, h), f"{ours}.self_attention.linear_qkv.weight", part)
                for part, n in enumerate(_ATTENTION)
            ),
            HfTensor(f"{layer}.self_attn.o_proj.weight", (h, h), f"{ours}.self_attention.linear_proj.weight", None),
            HfTensor(f"{layer}.post_attention_layernorm.weight", (h,), f"{ours}.pre_mlp_layernorm.weight", None),
        ]
        if form == "expanded":
            tensors += ffn(f"{layer}.mlp", ffn_prefix(model, i))
    tensors += [
        HfTensor("model.norm.weight", (h,), "final_layernorm.weight", None),
        HfTensor("lm_head.weight", (v, h), "output_layer.weight", None),
    ]
    return tensors


def name_stored_once(tensor: HfTensor) -> str:
    """A name that all layers give a weight which they share: `ffn.gate_proj.weight`."""
    place = tensor.whole.rsplit(".", 2)[0]
    return f"{place}.{'.'.join(tensor.name.rsplit('.', 2)[1:])}"


def stored_once(model: Model) -> dict[str, HfTensor]:
    """Every weight once, by such a name, each as the first tensor of the expanded form that it is."""
    found: dict[str, HfTensor] = {}
    for tensor in hf_tensors(model, "expanded"):
        found.setdefault(name_stored_once(tensor), tensor)
    return found


def assemble(name: str, model: Model, form: Form, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The whole-model tensor `name` put together from the Hugging Face tensors that `read` returns by name.

    Of equal copies of a shared FFN the first is taken.
    """
    parts: dict[int | None, torch.Tensor] = {}
    for tensor in hf_tensors(model, form):
        if tensor.whole == name and tensor.part not in parts:
            parts[tensor.part] = read(tensor.name)
    if None in parts:
        return parts[None]
    stacked = [parts[i] for i in range(len(parts))]
    if name.endswith("linear_qkv.weight"):
        return pack_weights(stacked, model.num_attention_heads)
    return torch.stack(stacked)
