"""A model that sees as stock `LlavaForConditionalGeneration`, with the processor that makes its inputs.

Names and files are those of LLaVA 1.5 on the hub, which `transformers` 4 and 5 both read. The language model is the
expanded one. Our encoder ends with the layer whose features are used, so `vision_feature_layer` is -1; the norm that
stock CLIP has behind it, for a token that LLaVA does not use, is written as one that changes nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from data_tools.vision.pictures import DEVIATION, MEAN
from megatron_patch.convert.names import HfTensor, hf_tensors
from megatron_patch.convert.source import ConvertError, WeightsSource
from megatron_patch.recipe import Model, Recipe, Vision
from megatron_patch.vision.shapes import ENCODER, PROJECTOR, clip_settings, vision_tensors

_NORM = f"{ENCODER}.post_layernorm"
_BICUBIC = 3  # PIL.Image.Resampling
PREPROCESSOR_NAME, PROCESSOR_NAME = "preprocessor_config.json", "processor_config.json"


class WithLastNorm:
    """A source of weights, and the norm that ours has not."""

    def __init__(self, source: WeightsSource) -> None:
        self._source = source
        self.recipe: Recipe = source.recipe
        self.step, self.samples, self.tokens = source.step, source.samples, source.tokens
        self.digest, self.data_digest = source.digest, source.data_digest

    def tensor(self, name: str) -> torch.Tensor:
        if not name.startswith(_NORM):
            return self._source.tensor(name)
        like = self._source.tensor(f"{ENCODER}.pre_layrnorm.weight")
        return torch.ones_like(like) if name.endswith("weight") else torch.zeros_like(like)


def llava_tensors(model: Model) -> list[HfTensor]:
    """Every tensor of the Hugging Face model.

    Raises:
        ConvertError: the projector shuffles pixels, which LLaVA's does not.
    """
    vision = _vision(model)
    if vision.pixel_shuffle > 1:
        raise ConvertError(
            f"model.vision.pixel_shuffle {vision.pixel_shuffle}: stock LlavaForConditionalGeneration has none, so no "
            "library could open the folder; train with pixel_shuffle=1 to export"
        )
    names = {f"{ENCODER}.": "vision_tower.vision_model.", f"{PROJECTOR}.": "multi_modal_projector."}
    norm = [(f"{_NORM}.{name}", (vision.hidden_size,)) for name in ("weight", "bias")]
    seen = [(tensor.name, tensor.shape) for tensor in vision_tensors(vision, model.hidden_size)]
    tensors = [
        HfTensor(f"{theirs}{name.removeprefix(ours)}", shape, name, None)
        for name, shape in [*seen, *norm]
        for ours, theirs in names.items()
        if name.startswith(ours)
    ]
    blind = model.model_copy(update={"vision": None})
    text = hf_tensors(blind, "expanded")
    return [*tensors, *(HfTensor(f"language_model.{t.name}", t.shape, t.whole, t.part) for t in text)]


def llava_config(model: Model, text: dict[str, Any]) -> dict[str, Any]:
    """`config.json` around that of the language model."""
    vision = _vision(model)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": {
            "model_type": "clip_vision_model",
            **clip_settings(vision),
            "projection_dim": vision.hidden_size,
        },
        "image_token_index": vision.placeholder_id,
        "image_seq_length": vision.tokens,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "multimodal_projector_bias": True,
        **{key: text[key] for key in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "torch_dtype")},
    }


def processor_files(model: Model, tokenizer_json: Path) -> dict[str, dict[str, Any]]:
    """Content of the files that `AutoProcessor` reads beside the tokenizer's, by name."""
    vision = _vision(model)
    side = vision.image_size
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # the classification token, which the strategy leaves out again
        "image_token": Tokenizer.from_file(str(tokenizer_json)).id_to_token(vision.placeholder_id),
    }
    pixels = {
        "image_processor_type": "LlavaImageProcessor" if vision.fit == "pad" else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        **({"do_pad": True} if vision.fit == "pad" else {}),
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(DEVIATION),
    }
    return {PROCESSOR_NAME: processor, PREPROCESSOR_NAME: pixels}


def _vision(model: Model) -> Vision:
    assert model.vision is not None
    return model.vision
