"""Where each local parameter stands in the whole model.

Checkpoints, initialisation and export speak of whole-model tensors, which no layout changes:

    embedding.word_embeddings.weight            [vocab, hidden]
    layers.I.input_layernorm.weight             [hidden]
    layers.I.self_attention.linear_qkv.weight   [3 x hidden, hidden]   rows by head: q, k, v of head 0, of head 1, ...
    layers.I.self_attention.linear_proj.weight  [hidden, hidden]
    layers.I.pre_mlp_layernorm.weight           [hidden]
    ffn.linear_fc1.weight                       [2, ffn, hidden]       gate, up   (layers.I.mlp... where dedicated)
    ffn.linear_fc2.weight                       [hidden, ffn]
    final_layernorm.weight                      [hidden]
    output_layer.weight                         [vocab, hidden]

A tensor-parallel rank holds an equal part of a whole tensor along one dimension.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_patch.recipe import Model

if TYPE_CHECKING:  # `plan` reads the shapes below and is not to wait for torch
    import torch

Kind = Literal["embedding", "matrix", "ffn", "norm"]


@dataclass(frozen=True)
class Whole:
    """A whole-model tensor: its name, shape, and the dimension that tensor parallelism cuts (None: replicated)."""

    name: str
    shape: tuple[int, ...]
    cut: int | None
    kind: Kind

    @property
    def layer(self) -> int | None:
        """Number of the decoder layer it belongs to, from 0; None of what stands outside the layers."""
        section, _, rest = self.name.partition(".")
        return int(rest.partition(".")[0]) if section == "layers" else None

    def part(self, tensor: torch.Tensor, index: int, parts: int) -> torch.Tensor:
        """The view of whole `tensor` that tensor-parallel rank `index` of `parts` holds."""
        return tensor if self.cut is None else tensor.chunk(parts, self.cut)[index]

    def part_shape(self, parts: int) -> tuple[int, ...]:
        return tuple(n // parts if d == self.cut else n for d, n in enumerate(self.shape))


def whole_tensors(model: Model) -> dict[str, Whole]:
    """Every tensor of the whole model by name, in forward order; a shared FFN stands once."""
    h, f, v = model.hidden_size, model.ffn_hidden_size, model.vocab_size

    def ffn(prefix: str, kind: Kind) -> list[Whole]:
        return [
            Whole(f"{prefix}.linear_fc1.weight", (2, f, h), 1, kind),
            Whole(f"{prefix}.linear_fc2.weight", (h, f), 1, kind),
        ]

    tensors = [Whole("embedding.word_embeddings.weight", (v, h), 0, "embedding")]
    for i in range(model.num_layers):
        tensors += [
            Whole(f"layers.{i}.input_layernorm.weight", (h,), None, "norm"),
            Whole(f"layers.{i}.self_attention.linear_qkv.weight", (3 * h, h), 0, "matrix"),
            Whole(f"layers.{i}.self_attention.linear_proj.weight", (h, h), 1, "matrix"),
            Whole(f"layers.{i}.pre_mlp_layernorm.weight", (h,), None, "norm"),
        ]
        if not model.shared_ffn:
            tensors += ffn(f"layers.{i}.mlp", "matrix")
    if model.shared_ffn:
        tensors += ffn("ffn", "ffn")
    tensors += [
        Whole("final_layernorm.weight", (h,), None, "norm"),
        Whole("output_layer.weight", (v, h), 0, "matrix"),
    ]
    return {t.name: t for t in tensors}


def local_parameters(chunks: Sequence[torch.nn.Module], model: Model) -> Iterator[tuple[Whole, torch.nn.Parameter]]:
    """The parameters this rank holds, each once, with the whole tensor it is (a part of)."""
    wholes = whole_tensors(model)
    seen: set[int] = set()
    for chunk in chunks:
        for local_name, parameter in chunk.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield wholes[_whole_name(chunk, local_name, model.shared_ffn)], parameter


def _whole_name(chunk: torch.nn.Module, local_name: str, shared_ffn: bool) -> str:
    name = local_name.removeprefix("decoder.")
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
        layer = chunk.decoder.layers[int(match[1])]  # type: ignore[union-attr,index]
        if shared_ffn and match[2].startswith("mlp."):
            return "ffn." + match[2].removeprefix("mlp.")
        return f"layers.{layer.layer_number - 1}.{match[2]}"  # type: ignore[union-attr]
    return name
