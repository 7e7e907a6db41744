"""A Hugging Face folder or a GGUF file as whole-model weights, every tensor checked.

Reads what `export` writes and the authors' published form: one tensor for each of 22 equal FFN copies, `.bin` files,
and a configuration that says 4 KV heads although the weights have 32 (docs/errata.md).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import torch

from data_tools.files.bounded_json import parse_bounded
from megatron_patch.convert import architecture
from megatron_patch.convert.hf_folder import HfFolder
from megatron_patch.convert.names import Form, HfTensor, assemble, hf_tensors
from megatron_patch.convert.source import ConvertError
from megatron_patch.model.parameters import ffn_prefix, ffn_prefixes
from megatron_patch.recipe import Recipe, load

_FFN_PARTS = ("gate_proj", "up_proj", "down_proj")
_COPY = re.compile(r"model\.layers\.(\d+)\.mlp\.(.+)")
_SHARED = re.compile(r"model\.ffns?\.")  # outside the layers
_BUFFER = "rotary_emb.inv_freq"  # saved by older transformers; computed, not trained
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Weights(Protocol):
    """Tensors by Hugging Face's names, as `HfFolder` and `GgufWeights` give them."""

    path: Path
    config_file: Path
    config: dict[str, Any]
    files: dict[str, Path]
    rounded: str | None

    @property
    def digest(self) -> str: ...
    def tensor(self, name: str) -> torch.Tensor: ...
    @property
    def provenance_place(self) -> str: ...
    def recipe(self) -> Recipe | None: ...
    def provenance(self) -> bytes | None: ...


def open_weights(path: Path) -> Weights:
    """A folder, or a GGUF file. Raises ConvertError where it is neither, ModuleNotFoundError without `gguf`."""
    if path.suffix != ".gguf" and (path.is_dir() or not path.exists()):
        return HfFolder(path)
    from megatron_patch.convert.gguf_weights import GgufWeights  # of the extra `devices`

    return GgufWeights(path)


class ImportedModel:
    """Somebody's weights as a `WeightsSource`; every tensor checked against the recipe before any is given out."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        """`recipe.precision` gives way to the precision of the weights.

        Raises ConvertError: a setting or shape that is not the recipe's, a missing tensor, unequal FFN copies, a value
        that is not finite.
        """
        self.weights = open_weights(path)
        provenance = _provenance(self.weights)
        self.step, self.samples, self.tokens = (provenance[name] for name in _COUNTS)
        self.data_digest: str | None = provenance["data_digest"]
        architecture.check(self.weights.config, recipe, self.weights.config_file)
        self.recipe = recipe.model_copy(update={"precision": self._precision()})
        self.is_tied: bool = self.weights.config.get("tie_word_embeddings", False)
        self.form: Form = "shared" if any(map(_SHARED.match, self.weights.files)) else "expanded"
        self._check_tensors()
        self._check_copies()
        self._check_head()

    @property
    def digest(self) -> str:
        return self.weights.digest

    def tensor(self, name: str) -> torch.Tensor:
        """bf16 where every tensor is; else fp32, into which fp16 and bf16 are widened without loss."""
        tensor = assemble(name, self.recipe.model, self.form, self._stored)
        if self.is_tied and name == "output_layer.weight":
            tensor = tensor.clone()  # a checkpoint holds no two tensors in one memory
        return tensor if self.recipe.precision == "bf16" else tensor.float()

    def hf_state(self) -> dict[str, torch.Tensor]:
        """Every tensor of the Hugging Face model by its name there, in fp32; copies of one are one in memory."""
        read: dict[str, torch.Tensor] = {}
        state = {}
        for tensor in hf_tensors(self.recipe.model, self.form):
            stored = self._name_stored(tensor.name)
            if stored not in read:
                read[stored] = self.weights.tensor(stored).float()
            state[tensor.name] = read[stored]
        return state

    def _stored(self, name: str) -> torch.Tensor:
        return self.weights.tensor(self._name_stored(name))

    def _name_stored(self, name: str) -> str:
        """Of what a folder holds once for several names, the name that it has there."""
        if name not in self.weights.files:
            if self.is_tied and name in (_HEAD, _EMBEDDING):
                return _EMBEDDING if name == _HEAD else _HEAD
            if self._holds_first_alone() and (copy := _COPY.match(name)):
                return f"model.layers.{self._first_with(int(copy[1]))}.mlp.{copy[2]}"
        return name

    def _precision(self) -> str:
        dtypes = {self.weights.tensor(name).dtype for name in self.weights.files if not name.endswith(_BUFFER)}
        return "bf16" if dtypes == {torch.bfloat16} else "fp32"

    def _check_tensors(self) -> None:
        expected = self._tensors_present()
        for tensor in expected:
            found, file = self.weights.tensor(tensor.name), self.weights.files[tensor.name]
            shape = tuple(found.shape)
            if found.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise ConvertError(
                    f"{file}: {tensor.name} is {found.dtype}; fetch the weights that are not "
                    "quantised (fp32, fp16 or bf16)"
                )
            if found.layout != torch.strided or found.is_meta:
                raise ConvertError(
                    f"{file}: {tensor.name} is {'without values' if found.is_meta else found.layout}, not a plain "
                    "tensor; save it again with transformers' save_pretrained"
                )
            if shape != tensor.shape:
                grouped = "k_proj" in tensor.name or "v_proj" in tensor.name
                raise ConvertError(
                    f"{file}: {tensor.name} is {shape}, expected {tensor.shape}"
                    + ("; the model has grouped KV heads, which MobiLlama has not" if grouped else "")
                )
            if not found.isfinite().all():
                raise ConvertError(
                    f"{file}: {tensor.name} holds values that are not finite; the weights are damaged, fetch them again"
                )
        for name in (name for name in self.weights.files if name.endswith(_BUFFER)):
            if not self._are_our_frequencies(self.weights.tensor(name)):
                raise ConvertError(
                    f"{self.weights.files[name]}: {name}: not the frequencies of model.rope_base "
                    f"{self.recipe.model.rope_base:g}; the model has another rotary embedding"
                )
        strays = {n for n in self.weights.files if not n.endswith(_BUFFER)} - {
            t.name for t in hf_tensors(self.recipe.model, self.form)
        }
        if strays:
            raise ConvertError(
                f"{self.weights.path}: unknown tensors, e.g. {min(strays)}; not a MobiLlama or LLaMA model"
            )

    def _are_our_frequencies(self, found: torch.Tensor) -> bool:
        """Older transformers turned heads by what the file holds; bf16 keeps 8 bits of it."""
        model = self.recipe.model
        ours = model.rope_base ** -(torch.arange(0, model.head_dim, 2) / model.head_dim)
        return found.shape == ours.shape and torch.allclose(found.float(), ours, rtol=1e-2, atol=0)

    def _check_head(self) -> None:
        if self.is_tied and not torch.equal(self._stored(_HEAD), self._stored(_EMBEDDING)):
            raise ConvertError(
                f"{self.weights.config_file}: tie_word_embeddings is true, but lm_head.weight is not the "
                "embedding; set it to false if the head was trained by itself"
            )

    def _tensors_present(self) -> list[HfTensor]:
        """What must be there: of a shared FFN saved by transformers 4, its first copy may be; of a tied pair, one."""
        tensors = hf_tensors(self.recipe.model, self.form)
        if self.is_tied and (_HEAD in self.weights.files) != (_EMBEDDING in self.weights.files):
            tensors = [t for t in tensors if t.name not in (_HEAD, _EMBEDDING) or t.name in self.weights.files]
        if self._holds_first_alone():
            first = {f"model.layers.{i}.mlp.{part}.weight" for i in self._copies() for part in _FFN_PARTS}
            tensors = [t for t in tensors if ".mlp." not in t.name or t.name in first]
        return tensors

    def _first_with(self, layer: int) -> int:
        """The first layer that uses the FFN of `layer`."""
        return ffn_prefixes(self.recipe.model)[ffn_prefix(self.recipe.model, layer)][0]

    def _holds_first_alone(self) -> bool:
        """Whether each shared FFN stands in its first layer alone."""
        return self._copies() == sorted(layers[0] for layers in ffn_prefixes(self.recipe.model).values())

    def _copies(self) -> list[int]:
        """Layers that carry a copy of a shared FFN."""
        if self.form == "shared" or not self.recipe.model.shared_ffn:
            return []
        return [
            i
            for i in range(self.recipe.model.num_layers)
            if f"model.layers.{i}.mlp.{_FFN_PARTS[0]}.weight" in self.weights.files
        ]

    def _check_copies(self) -> None:
        copies = set(self._copies())
        for layers in ffn_prefixes(self.recipe.model).values() if copies else ():
            for part in _FFN_PARTS:
                first = self.weights.tensor(f"model.layers.{layers[0]}.mlp.{part}.weight")
                for i in sorted(copies & set(layers[1:])):
                    name = f"model.layers.{i}.mlp.{part}.weight"
                    if not torch.equal(self.weights.tensor(name), first):
                        raise ConvertError(
                            f"{self.weights.files[name]}: {name} differs from layer {layers[0]}'s, but in the recipe "
                            f"{self.recipe.name} the two share an FFN; the weights are damaged, or each layer has its "
                            "own (--recipe large_base)"
                        )


def recipe_of(path: Path, recipe_file: Path | None) -> Recipe:
    """The recipe given, or the one that `export` left in the folder or file.

    Raises:
        ConvertError: there is neither.
        RecipeError: it is not a valid recipe.
    """
    found = load(recipe_file) if recipe_file else open_weights(path).recipe()
    if found is None:
        raise ConvertError(f"{path}: carries no recipe; name the model's, e.g. --recipe recipes/mobillama_05b.yaml")
    return found


_COUNTS = ("step", "samples", "tokens")


def _provenance(weights: Weights) -> dict[str, Any]:
    """What `export` recorded; where it did not, zeros."""
    try:
        content = weights.provenance()
        if content is None:
            return {**dict.fromkeys(_COUNTS, 0), "data_digest": None}
        provenance = parse_bounded(content)
        if not isinstance(provenance, dict):
            raise ValueError("not an object")
        for name in _COUNTS:
            value = provenance.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
                raise ValueError(f"{name} is {str(value)[:40]}, not a whole number of at least 0 in 64 bits")
        digest = provenance.setdefault("data_digest", None)
        if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{1,64}", digest)):
            raise ValueError(f"data_digest is {ascii(digest)[:40]}, not a text of hexadecimal digits")
    except ValueError as error:
        raise ConvertError(
            f"{weights.provenance_place}: damaged ({error}); fetch it again, or remove it to count from step 0"
        ) from None
    return provenance
