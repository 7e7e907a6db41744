"""What an exported form is, from its files: which runtime opens it, how large it is, how many weights it stores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_patch.devices.runtimes import (
    CTranslate2,
    ExecuTorch,
    LlamaCpp,
    OnnxRuntime,
    Runtime,
    RuntimeFormError,
    Transformers,
)
from megatron_patch.model.counts import parameters
from megatron_patch.recipe import Model

_FP32_BITS = 31  # and more: the file has names and a tokenizer besides

Kind = Literal["gguf", "onnx", "ctranslate2", "executorch", "expanded", "shared"]


@dataclass(frozen=True)
class DeviceForm:
    """A form on disk.

    Attributes:
        path: as it was named: a file or a folder.
        kind: which of them.
        model_file: what its runtime opens.
        weight_files: the files of the weights, and of the graph.
    """

    path: Path
    kind: Kind
    model_file: Path
    weight_files: tuple[Path, ...]

    @property
    def file_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.weight_files)

    def stored(self, model: Model) -> int:
        """Weights in the files: each once, or an FFN for every layer."""
        counted = parameters(model)
        return counted.applied if self.kind in ("gguf", "expanded") else counted.unique

    def bits(self, model: Model) -> float:
        """Bits of file a stored weight."""
        return 8 * self.file_bytes / self.stored(model)

    def is_fp32(self, model: Model) -> bool:
        """Whether its weights are the checkpoint's, unrounded."""
        return self.bits(model) > _FP32_BITS

    def bytes_read(self, model: Model) -> float:
        """Bytes of weights that a token's decoding reads: of each layer its own, an FFN at every use; no embedding."""
        counted = parameters(model)
        return self.bits(model) / 8 * (counted.applied - counted.embedding)

    def open(self, threads: int, context: int, exact: bool) -> Runtime:
        """`exact`: with as little rounding as its runtime can. Raises RuntimeFormError where that cannot open it."""
        if self.kind == "gguf":
            return LlamaCpp(self.model_file, threads, context, exact)
        if self.kind == "onnx":
            return OnnxRuntime(self.model_file, threads)
        if self.kind == "ctranslate2":
            return CTranslate2(self.path, threads)
        if self.kind == "executorch":
            return ExecuTorch(self.model_file, threads, context)
        return Transformers(self.path, threads)


def find_form(path: Path) -> DeviceForm:
    """The form that a file or folder is. Raises RuntimeFormError where it is none."""
    if path.is_file() and path.suffix == ".gguf":
        return DeviceForm(path, "gguf", path, (path,))
    if path.is_file() and path.suffix == ".pte":
        return DeviceForm(path, "executorch", path, (path,))
    graphs = sorted((path / "onnx").glob("*.onnx"))
    if len(graphs) == 1:
        data = sorted((path / "onnx").glob("*.onnx_data"))
        return DeviceForm(path, "onnx", graphs[0], (graphs[0], *data))
    if (path / "model.bin").is_file() and (path / "vocabulary.json").is_file():
        return DeviceForm(path, "ctranslate2", path / "model.bin", (path / "model.bin",))
    weights = tuple(sorted(path.glob("*.safetensors")))
    if weights and (path / "config.json").is_file():
        kind: Kind = "shared" if (path / "modeling_mobillama.py").is_file() else "expanded"
        return DeviceForm(path, kind, weights[0], weights)
    raise RuntimeFormError(
        f"{path}: no .gguf or .pte file, no folder of `export` and none of CTranslate2's converter; "
        "docs/devices.md has the command of each"
    )
