"""The tensors of encoder and projector by name, the arithmetic of an image. Nothing here imports torch.

vision.encoder.NAME      as `transformers` names them in its `CLIPVisionModel`
vision.projector.NAME    linear_1, linear_2, as in its `LlavaForConditionalGeneration`
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_patch.recipe import Vision

ENCODER, PROJECTOR = "vision.encoder", "vision.projector"
CHANNELS = 3


class VisionTensor(NamedTuple):
    """A tensor of encoder or projector."""

    name: str
    shape: tuple[int, ...]
    constant: float | None
    """What it is filled with before training; None: drawn."""


def encoder_tensors(vision: Vision) -> Iterator[VisionTensor]:
    """Those of the layers that run, under the names of `CLIPVisionModel`.

    Not the norm behind the last layer, which belongs to the classification token that LLaVA does not use.
    """
    h, f, p = vision.hidden_size, vision.ffn_hidden_size, vision.patch_size
    yield VisionTensor("embeddings.class_embedding", (h,), None)
    yield VisionTensor("embeddings.patch_embedding.weight", (h, CHANNELS, p, p), None)
    yield VisionTensor("embeddings.position_embedding.weight", (vision.grid**2 + 1, h), None)
    yield from _norm("pre_layrnorm", h)
    for i in range(vision.num_layers):
        layer = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{name}", h, h)
        yield from _norm(f"{layer}.layer_norm1", h)
        yield from _linear(f"{layer}.mlp.fc1", f, h)
        yield from _linear(f"{layer}.mlp.fc2", h, f)
        yield from _norm(f"{layer}.layer_norm2", h)


def projector_tensors(vision: Vision, hidden_size: int) -> Iterator[VisionTensor]:
    """`hidden_size` is the decoder's."""
    yield from _linear("linear_1", hidden_size, vision.hidden_size * vision.pixel_shuffle**2)
    yield from _linear("linear_2", hidden_size, hidden_size)


def vision_tensors(vision: Vision, hidden_size: int) -> Iterator[VisionTensor]:
    """All of them under their whole-model names, in forward order."""
    for prefix, tensors in ((ENCODER, encoder_tensors(vision)), (PROJECTOR, projector_tensors(vision, hidden_size))):
        yield from (tensor._replace(name=f"{prefix}.{tensor.name}") for tensor in tensors)


def clip_settings(vision: Vision) -> dict[str, Any]:
    """The keys of `CLIPVisionConfig`."""
    return {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "layer_norm_eps": vision.norm_epsilon,
        "hidden_act": vision.activation,
    }


def flops_per_image(vision: Vision, hidden_size: int, *, encoder_trained: bool = True) -> int:
    """Floating point operations of encoder and projector, forward and backward, for one image.

    2 for each element of a matrix and token, and 4 x width for each of the patches that a patch attends to; backward is
    twice the forward. A frozen encoder has none.
    """
    patches = vision.grid**2 + 1
    h, f = vision.hidden_size, vision.ffn_hidden_size
    embedding = 2 * vision.grid**2 * h * CHANNELS * vision.patch_size**2
    layer = 2 * patches * (4 * h * h + 2 * h * f) + 4 * patches * patches * h
    projector = 2 * vision.tokens * (h * vision.pixel_shuffle**2 * hidden_size + hidden_size**2)
    return (3 if encoder_trained else 1) * (embedding + vision.num_layers * layer) + 3 * projector


def _linear(name: str, rows: int, columns: int) -> Iterator[VisionTensor]:
    yield VisionTensor(f"{name}.weight", (rows, columns), None)
    yield VisionTensor(f"{name}.bias", (rows,), 0.0)


def _norm(name: str, width: int) -> Iterator[VisionTensor]:
    yield VisionTensor(f"{name}.weight", (width,), 1.0)
    yield VisionTensor(f"{name}.bias", (width,), 0.0)
