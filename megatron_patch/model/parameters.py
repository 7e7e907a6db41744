"""Where each local parameter stands in the whole model.

Checkpoints, initialisation and export name whole-model tensors, which no layout changes:

    embedding.word_embeddings.weight            [vocab, hidden]
    layers.I.input_layernorm.weight             [hidden]
    layers.I.self_attention.linear_qkv.weight   [3 x hidden, hidden]   rows by head (kernels/packed_qkv.py)
    layers.I.self_attention.linear_proj.weight  [hidden, hidden]
    layers.I.pre_mlp_layernorm.weight           [hidden]
    ffn.linear_fc1.weight                       [2, ffn, hidden]       gate, up
    ffn.linear_fc2.weight                       [hidden, ffn]          (of several ffns.K, of its own layers.I.mlp)
    final_layernorm.weight                      [hidden]
    output_layer.weight                         [vocab, hidden]
    vision.encoder..., vision.projector...      of a model that sees (vision/shapes.py)

A tensor-parallel rank holds an equal part of a whole tensor along one dimension. A tensor that several layers use, as
all of them use MobiLlama's FFN, stands once: `Whole.layers` says which ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_patch.kernels.packed_qkv import packed_rows
from megatron_patch.recipe import Model, Recipe
from megatron_patch.vision.shapes import ENCODER, vision_tensors

if TYPE_CHECKING:  # `plan` reads the shapes below and is not to wait for torch
    import torch

Kind = Literal["embedding", "attention", "ffn", "norm", "head", "encoder", "projector"]
Part = Literal["encoder", "projector", "decoder"]


@dataclass(frozen=True)
class Whole:
    """A whole-model tensor.

    Attributes:
        name: its name in checkpoints.
        shape: its shape.
        cut: the dimension that tensor parallelism cuts; None: every tensor-parallel rank holds it whole.
        kind: which part of the model it is.
        layers: decoder layers that use it, from 0; none: it stands before or behind them.
        of_heads: whether a use of a tensor that is not cut sees this rank's heads or columns alone, so that a rank's
            gradient is a part of the sum under tensor parallelism of any form.
        constant: what it is filled with before training; None: ones for a norm, else drawn.
    """

    name: str
    shape: tuple[int, ...]
    cut: int | None
    kind: Kind
    layers: tuple[int, ...] = ()
    of_heads: bool = False
    constant: float | None = None

    @property
    def of(self) -> Part:
        """The part of the model that is trained or frozen, at a learning rate of its own."""
        return self.kind if self.kind in ("encoder", "projector") else "decoder"

    @property
    def shared(self) -> bool:
        """Whether several layers use it."""
        return len(self.layers) > 1

    def numel(self) -> int:
        """Scalars of the whole tensor."""
        return math.prod(self.shape)

    def part(self, tensor: torch.Tensor, index: int, parts: int) -> torch.Tensor:
        """The view of whole `tensor` that tensor-parallel rank `index` of `parts` holds."""
        return tensor if self.cut is None else tensor.chunk(parts, self.cut)[index]

    def part_shape(self, parts: int) -> tuple[int, ...]:
        return tuple(n // parts if d == self.cut else n for d, n in enumerate(self.shape))


def ffn_prefix(model: Model, layer: int) -> str:
    """Name of the FFN that decoder layer `layer` (from 0) uses: the one place that says what is shared with whom."""
    if not model.shared_ffn:
        return f"layers.{layer}.mlp"
    return "ffn" if model.ffn_count == 1 else f"ffns.{model.ffn_of(layer)}"


def ffn_prefixes(model: Model) -> dict[str, tuple[int, ...]]:
    """The layers that use each FFN, by its name, in the order of their first use."""
    users: dict[str, tuple[int, ...]] = {}
    for layer in range(model.num_layers):
        name = ffn_prefix(model, layer)
        users[name] = (*users.get(name, ()), layer)
    return users


def whole_tensors(model: Model) -> dict[str, Whole]:
    """Every tensor of the whole model by name, in forward order; one that several layers use stands once."""
    h, f, v = model.hidden_size, model.ffn_hidden_size, model.vocab_size
    qkv = packed_rows(model.num_attention_heads, model.head_dim)

    def ffn(prefix: str, users: tuple[int, ...]) -> list[Whole]:
        return [
            Whole(f"{prefix}.linear_fc1.weight", (2, f, h), 1, "ffn", users),
            Whole(f"{prefix}.linear_fc2.weight", (h, f), 1, "ffn", users),
        ]

    ffns = ffn_prefixes(model)
    tensors = [Whole("embedding.word_embeddings.weight", (v, h), 0, "embedding")]
    if model.vision is not None:
        tensors += [
            Whole(name, shape, None, "encoder" if name.startswith(ENCODER) else "projector", constant=constant)
            for name, shape, constant in vision_tensors(model.vision, h)
        ]
    for i in range(model.num_layers):
        tensors += [
            Whole(f"layers.{i}.input_layernorm.weight", (h,), None, "norm", (i,)),
            Whole(f"layers.{i}.self_attention.linear_qkv.weight", (qkv, h), 0, "attention", (i,)),
            Whole(f"layers.{i}.self_attention.linear_proj.weight", (h, h), 1, "attention", (i,)),
            Whole(f"layers.{i}.pre_mlp_layernorm.weight", (h,), None, "norm", (i,)),
        ]
        if not model.shared_ffn:
            tensors += ffn(ffn_prefix(model, i), (i,))
    if model.shared_ffn:
        tensors += [tensor for prefix, users in ffns.items() for tensor in ffn(prefix, users)]
    tensors += [
        Whole("final_layernorm.weight", (h,), None, "norm"),
        Whole("output_layer.weight", (v, h), 0, "head"),
    ]
    return {t.name: t for t in tensors}


def stage_layers(recipe: Recipe) -> list[tuple[int, ...]]:
    """Decoder layers (from 0) that each pipeline stage holds, those of all its virtual chunks together.

    Where the layers do not divide over the chunks, embedding and loss count as a layer each: the first chunk of the
    first stage and the last chunk of the last stage hold one layer less.
    """
    p, count = recipe.parallel, recipe.model.num_layers
    chunks = p.pipeline * p.virtual_pipeline
    slots = count + 2 if recipe.pads_pipeline_split else count
    first = -1 if recipe.pads_pipeline_split else 0  # the embedding's slot
    held: list[tuple[int, ...]] = [()] * p.pipeline
    for chunk in range(chunks):
        start = first + chunk * slots // chunks
        held[chunk % p.pipeline] += tuple(i for i in range(start, start + slots // chunks) if 0 <= i < count)
    return held


def stages_of(whole: Whole, recipe: Recipe) -> tuple[int, ...]:
    """Pipeline stages that hold a tensor, first one first."""
    if not whole.layers:
        return (0,) if whole.kind in ("embedding", "encoder", "projector") else (recipe.parallel.pipeline - 1,)
    return tuple(stage for stage, held in enumerate(stage_layers(recipe)) if set(held) & set(whole.layers))


def local_parameters(chunks: Sequence[torch.nn.Module], model: Model) -> Iterator[tuple[Whole, torch.nn.Parameter]]:
    """The parameters this rank holds, each once, with the whole tensor it is (a part of).

    Raises:
        ValueError: a parameter that `whole_tensors` does not name, so that nobody would sum, count or save it rightly.
    """
    wholes = whole_tensors(model)
    seen: set[int] = set()
    for chunk in chunks:
        for local_name, parameter in chunk.named_parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = _whole_name(chunk, local_name, model)
            if name not in wholes:
                raise ValueError(
                    f"the model's parameter {local_name} is no whole tensor: name it {name} in whole_tensors "
                    "(megatron_patch/model/parameters.py), with who uses it"
                )
            yield wholes[name], parameter


def _whole_name(chunk: torch.nn.Module, local_name: str, model: Model) -> str:
    name = local_name.removeprefix("decoder.")
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
        layer = chunk.decoder.layers[int(match[1])].layer_number - 1  # type: ignore[union-attr,index]
        if match[2].startswith("mlp."):
            return f"{ffn_prefix(model, layer)}.{match[2].removeprefix('mlp.')}"
        return f"layers.{layer}.{match[2]}"
    return name
