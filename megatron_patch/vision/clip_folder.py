"""Weights of an encoder from a Hugging Face folder: a whole CLIP, its vision part alone, or a LLaVA's vision tower."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data_tools.files.bounded_json import load_bounded
from megatron_patch.recipe import RecipeError, Vision
from megatron_patch.vision.shapes import encoder_tensors

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PREFIXES = (
    "",
    "vision_model.",
    "model.vision_tower.",
    "model.vision_tower.vision_model.",
    "vision_tower.vision_model.",
)


class ClipFolder:
    """The encoder's tensors by name (vision/shapes.py); layers beyond those that run are left in the folder."""

    def __init__(self, folder: Path, vision: Vision) -> None:
        """Raises RecipeError where the folder has not all of the encoder's tensors, or they are another encoder's."""
        self._folder = folder
        self._check_settings(vision)
        self._files = self._find()
        wanted = {tensor.name: tensor.shape for tensor in encoder_tensors(vision)}
        self._prefix = next((p for p in _PREFIXES if f"{p}embeddings.class_embedding" in self._files), None)
        if self._prefix is None:
            raise self._refused("no encoder of CLIP's among its tensors")
        for name, shape in wanted.items():
            if self._prefix + name not in self._files:
                raise self._refused(f"no tensor {self._prefix}{name}")
            if (found := tuple(self.tensor(name).shape)) != shape:
                raise self._refused(f"{name} is {list(found)}, and model.vision says {list(shape)}")

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name, on the CPU."""
        file = self._files[f"{self._prefix}{name}"]
        try:
            with safe_open(file, "pt") as opened:
                return opened.get_tensor(f"{self._prefix}{name}")
        except SafetensorError as error:
            raise self._refused(f"{file.name}: {error}") from None

    def _check_settings(self, vision: Vision) -> None:
        """What shapes do not show; config.json of a whole CLIP or LLaVA has it in `vision_config`."""
        config = self._json("config.json")
        config = config.get("vision_config", config)
        for key, default, ours in (
            ("hidden_act", "quick_gelu", vision.activation),
            ("layer_norm_eps", 1e-5, vision.norm_epsilon),
            ("num_attention_heads", 12, vision.num_attention_heads),
            ("image_size", 224, vision.image_size),
        ):
            if (theirs := config.get(key, default)) != ours:
                raise self._refused(f"its {key} is {theirs}, and model.vision says {ours}")
        if config.get("num_hidden_layers", 12) < vision.num_layers:
            raise self._refused(f"{config.get('num_hidden_layers')} layers, and model.vision runs {vision.num_layers}")

    def _find(self) -> dict[str, Path]:
        if (self._folder / _INDEX).is_file():
            names: dict[str, str] = self._json(_INDEX).get("weight_map") or {}
            if strays := [f for f in names.values() if Path(f).name != f or not (self._folder / f).is_file()]:
                raise self._refused(f"{_INDEX} names {strays[0]!r}, which is no file of it")
            return {name: self._folder / file for name, file in names.items()}
        try:
            with safe_open(self._folder / _SINGLE, "pt") as opened:
                keys: Iterable[str] = opened.keys()
                return dict.fromkeys(keys, self._folder / _SINGLE)
        except (SafetensorError, OSError) as error:
            raise self._refused(f"{_SINGLE} cannot be read ({error})") from None

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = load_bounded(self._folder / name)
        except (OSError, ValueError) as error:
            raise self._refused(f"{name} cannot be read ({error})") from None
        if not isinstance(value, dict):
            raise self._refused(f"{name} is no JSON object")
        return value

    def _refused(self, said: str) -> RecipeError:
        return RecipeError(f"{self._folder}: {said}; name a folder of CLIP's safetensors as run.initial_encoder")
