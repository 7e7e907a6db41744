"""Reads the tensors of a Hugging Face folder by name: safetensors, or `.bin` files without unpickling objects."""

from __future__ import annotations

import os
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data_tools.files.bounded_json import load_bounded, read_bounded
from data_tools.files.digest import digest_stream, new_digest
from megatron_patch.convert.export import PROVENANCE_NAME
from megatron_patch.convert.source import MOST_PROVENANCE, ConvertError
from megatron_patch.recipe import Recipe, load

_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Of the weights, in the order in which `transformers` looks for them: a folder may have several."""
_ADAPTER = "adapter_config.json"


class HfFolder:
    """Tensors of a Hugging Face folder.

    Attributes:
        path: the folder.
        config_file: its config.json.
        config: the content of that.
        files: tensor name -> file that holds it.
        rounded: the quantization of its matrices: none, here.
    """

    rounded: str | None = None

    def __init__(self, folder: Path) -> None:
        """Raises ConvertError where config.json or the weights are missing or cannot be read."""
        self.path = folder
        self.config_file = folder / "config.json"
        self.config = self._json("config.json")
        self._bins: dict[Path, dict[str, torch.Tensor]] = {}
        self._safetensors: dict[Path, Any] = {}
        self.files = self._find()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name, on the CPU. Raises ConvertError where the folder has none."""
        if name not in self.files:
            raise ConvertError(f"{self.path}: no tensor {name} in its weights; the folder is incomplete")
        file = self.files[name]
        try:
            if file.suffix == ".bin":
                return self._bin(file)[name]
            return self._opened(file).get_tensor(name)
        except (SafetensorError, KeyError) as error:
            raise ConvertError(f"{file}: no tensor {name} ({error}); the file and its index disagree") from None

    @cached_property
    def digest(self) -> str:
        """XXH3-128 over the weight files' bytes, in the order of their names."""
        digest = new_digest()
        for file in sorted(set(self.files.values())):
            with file.open("rb") as stream:
                digest_stream(stream, digest)
        return str(digest.hexdigest())

    def recipe(self) -> Recipe | None:
        """The recipe that `export` left in the folder. Raises RecipeError where it is none that can be run."""
        file = self.path / "recipe.yaml"
        return load(file) if file.is_file() else None

    @property
    def provenance_place(self) -> str:
        return str(self.path / PROVENANCE_NAME)

    def provenance(self) -> bytes | None:
        """The JSON that `export` recorded; None where it did not. Raises ValueError."""
        file = self.path / PROVENANCE_NAME
        try:
            return read_bounded(file, MOST_PROVENANCE) if os.path.lexists(file) else None
        except OSError as error:
            raise ValueError(error.strerror) from None

    def _find(self) -> dict[str, Path]:
        if (self.path / _ADAPTER).is_file():
            raise ConvertError(
                f"{self.path / _ADAPTER}: transformers would add this adapter to the weights; merge it into them, or "
                "move it away"
            )
        for name in _NAMES:
            file = self.path / name
            if file.is_file():
                return self._indexed(name) if file.suffix == ".json" else dict.fromkeys(self._names_in(file), file)
        raise ConvertError(f"{self.path}: none of {', '.join(_NAMES)}; not a model's folder")

    def _indexed(self, name: str) -> dict[str, Path]:
        """What the files of an index hold, named by it or not, and what it names, there or not."""
        weight_map = self._json(name).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConvertError(f"{self.path / name}: names no files; fetch it again")
        strays = [f for f in weight_map.values() if not self._holds(f)]
        if strays:
            raise ConvertError(
                f"{self.path / name}: names {strays[0]!r}, which is no file of the folder; fetch it again"
            )
        shards = [self.path / file for file in sorted(set(weight_map.values()))]
        held: dict[str, Path] = {}
        for shard in shards:
            for tensor in self._names_in(shard):
                if tensor in held:  # which of them is the model's, transformers and others answer differently
                    raise ConvertError(
                        f"{shard}: holds {tensor}, and so does {held[tensor].name}; the files are of two uploads: "
                        "fetch the folder again"
                    )
                held[tensor] = shard
        return held | {tensor: self.path / file for tensor, file in weight_map.items()}

    def _names_in(self, file: Path) -> list[str]:
        return list(self._bin(file)) if file.suffix == ".bin" else list(self._opened(file).keys())

    def _opened(self, file: Path) -> Any:
        if file not in self._safetensors:
            try:
                self._safetensors[file] = safe_open(file, "pt")
            except SafetensorError as error:
                raise ConvertError(f"{file}: not safetensors ({error}); fetch the file again") from None
        return self._safetensors[file]

    def _holds(self, name: Any) -> bool:
        return isinstance(name, str) and Path(name).name == name and (self.path / name).is_file()

    def _bin(self, file: Path) -> dict[str, torch.Tensor]:
        if file not in self._bins:
            try:
                # mmap: only the tensors that are used are read; not of a file as torch wrote them before 1.6.
                # weights_only: nothing in the file is executed.
                content = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
            except Exception as error:  # torch.load raises bare, pickle's and zip's errors
                raise ConvertError(
                    f"{file}: cannot be read without unpickling objects ({str(error).splitlines()[0]}); "
                    "save it again with transformers' save_pretrained"
                ) from None
            if not isinstance(content, dict):
                raise ConvertError(f"{file}: holds {type(content).__name__}, not tensors by name; fetch the file again")
            self._bins[file] = {
                name: value
                for name, value in content.items()
                if isinstance(name, str) and isinstance(value, torch.Tensor)
            }
        return self._bins[file]

    def _json(self, name: str) -> dict[str, Any]:
        try:
            value = load_bounded(self.path / name)
        except FileNotFoundError:
            raise ConvertError(f"{self.path}: no {name}; not a Hugging Face model's folder") from None
        except ValueError as error:
            raise ConvertError(f"{self.path / name}: not JSON ({error}); fetch the file again") from None
        if not isinstance(value, dict):
            raise ConvertError(f"{self.path / name}: not a JSON object; fetch the file again")
        return value
