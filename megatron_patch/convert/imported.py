"""`python -m megatron_patch import`: a Hugging Face folder as a checkpoint.

Reads what `export` writes and the authors' published form: one tensor for each of 22 equal FFN copies, `.bin` files,
and a configuration that says 4 KV heads although the weights have 32 (docs/errata.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_patch.convert.export import PROVENANCE_NAME
from megatron_patch.convert.hf_folder import HfFolder
from megatron_patch.convert.names import Form, HfTensor, assemble, hf_tensors
from megatron_patch.convert.source import ConvertError
from megatron_patch.recipe import Recipe, load

_FFN_PARTS = ("gate_proj", "up_proj", "down_proj")
_BUFFER = "rotary_emb.inv_freq"  # saved by older transformers; computed, not trained
_CONFIG_KEYS = {  # of the configuration -> of the recipe; the shapes of the tensors have the last word on KV heads
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "rms_norm_eps": "norm_epsilon",
}


class ImportedModel:
    """A Hugging Face folder as a `WeightsSource`; every tensor checked against the recipe before any is given out."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        """`recipe.precision` gives way to the precision of the weights.

        Raises ConvertError: a setting or shape that is not the recipe's, a missing tensor, unequal FFN copies, a value
        that is not finite.
        """
        self.hf = HfFolder(folder)
        provenance = _provenance(folder)
        self.step: int = provenance.get("step", 0)
        self.samples: int = provenance.get("samples", 0)
        self.tokens: int = provenance.get("tokens", 0)
        self.data_digest: str | None = provenance.get("data_digest")
        self.recipe = recipe.model_copy(update={"precision": self._precision()})
        self._check_config()
        self.form: Form = "shared" if f"model.ffn.{_FFN_PARTS[0]}.weight" in self.hf.files else "expanded"
        self._check_tensors()
        self._check_copies()
        self._check_head()

    @property
    def digest(self) -> str:
        return self.hf.digest

    def tensor(self, name: str) -> torch.Tensor:
        """bf16 where every tensor is; else fp32, into which fp16 and bf16 are widened without loss."""
        tensor = assemble(name, self.recipe.model, self.form, self.hf.tensor)
        return tensor if self.recipe.precision == "bf16" else tensor.float()

    def _precision(self) -> str:
        dtypes = {self.hf.tensor(name).dtype for name in self.hf.files if not name.endswith(_BUFFER)}
        return "bf16" if dtypes == {torch.bfloat16} else "fp32"

    def _check_config(self) -> None:
        for key, ours in _CONFIG_KEYS.items():
            theirs, expected = self.hf.config.get(key), getattr(self.recipe.model, ours)
            if theirs != expected:
                raise ConvertError(
                    f"{self.hf.folder / 'config.json'}: {key} is {theirs!r}, but the recipe {self.recipe.name} has "
                    f"model.{ours} {expected}; choose the recipe of this model with --recipe"
                )

        if (theirs := self.hf.config.get("hidden_act", "silu")) != "silu":
            raise ConvertError(f"{self.hf.folder / 'config.json'}: hidden_act is {theirs}; MobiLlama's FFN has silu")
        rope = self.hf.config.get("rope_parameters") or self.hf.config.get("rope_scaling") or {}  # transformers 5 or 4
        if not isinstance(rope, dict):
            raise ConvertError(f"{self.hf.folder / 'config.json'}: its rotary embedding is {rope!r}, not an object")
        kind = rope.get("rope_type") or rope.get("type") or "default"
        base = self.hf.config.get("rope_theta") or rope.get("rope_theta") or 10000  # the authors' code knows no other
        if (kind, base) != ("default", self.recipe.model.rope_base):
            shown = f"{base:g}" if isinstance(base, int | float) else repr(base)
            raise ConvertError(
                f"{self.hf.folder / 'config.json'}: rotary embedding of type {kind}, base {shown}; the recipe "
                f"{self.recipe.name} has the default type and model.rope_base {self.recipe.model.rope_base:g}"
            )

    def _check_tensors(self) -> None:
        expected = self._tensors_present()
        for tensor in expected:
            found = self.hf.tensor(tensor.name)
            shape = tuple(found.shape)
            if found.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise ConvertError(
                    f"{self.hf.files[tensor.name]}: {tensor.name} is {found.dtype}; fetch the weights that are not "
                    "quantised (fp32, fp16 or bf16)"
                )
            if shape != tensor.shape:
                grouped = "k_proj" in tensor.name or "v_proj" in tensor.name
                raise ConvertError(
                    f"{self.hf.files[tensor.name]}: {tensor.name} is {shape}, expected {tensor.shape}"
                    + ("; the model has grouped KV heads, which MobiLlama has not" if grouped else "")
                )
            if not found.isfinite().all():
                raise ConvertError(
                    f"{self.hf.files[tensor.name]}: {tensor.name} holds values that are not finite; the weights are "
                    "damaged, fetch them again"
                )
        strays = {n for n in self.hf.files if not n.endswith(_BUFFER)} - {
            t.name for t in hf_tensors(self.recipe.model, self.form)
        }
        if strays:
            raise ConvertError(f"{self.hf.folder}: unknown tensors, e.g. {min(strays)}; not a MobiLlama or LLaMA model")

    def _check_head(self) -> None:
        if not self.hf.config.get("tie_word_embeddings"):
            return
        head, embedding = (self.hf.tensor(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        if not torch.equal(head, embedding):
            raise ConvertError(
                f"{self.hf.folder / 'config.json'}: tie_word_embeddings is true, but lm_head.weight is not the "
                "embedding; set it to false if the head was trained by itself"
            )

    def _tensors_present(self) -> list[HfTensor]:
        """What must be there: of a shared FFN saved by transformers 4, layer 0 alone may be."""
        tensors = hf_tensors(self.recipe.model, self.form)
        if self._copies() == [0]:
            first = tuple(f"model.layers.0.mlp.{part}.weight" for part in _FFN_PARTS)
            tensors = [t for t in tensors if ".mlp." not in t.name or t.name in first]
        return tensors

    def _copies(self) -> list[int]:
        """Layers that carry a copy of a shared FFN."""
        if self.form == "shared" or not self.recipe.model.shared_ffn:
            return []
        return [
            i
            for i in range(self.recipe.model.num_layers)
            if f"model.layers.{i}.mlp.{_FFN_PARTS[0]}.weight" in self.hf.files
        ]

    def _check_copies(self) -> None:
        for part in _FFN_PARTS:
            for i in self._copies():
                name = f"model.layers.{i}.mlp.{part}.weight"
                if not torch.equal(self.hf.tensor(name), self.hf.tensor(f"model.layers.0.mlp.{part}.weight")):
                    raise ConvertError(
                        f"{self.hf.files[name]}: {name} differs from layer 0's, but the recipe {self.recipe.name} "
                        "shares one FFN; the weights are damaged, or each layer has its own (--recipe large_base)"
                    )


def recipe_of(folder: Path, recipe_file: Path | None) -> Recipe:
    """The recipe given, or the one that `export` left in the folder.

    Raises:
        ConvertError: there is neither.
        RecipeError: it is not a valid recipe.
    """
    file = recipe_file or folder / "recipe.yaml"
    if not file.is_file():
        raise ConvertError(
            f"{folder}: carries no recipe.yaml; name the model's recipe, e.g. --recipe recipes/mobillama_05b.yaml"
        )
    return load(file)


def _provenance(folder: Path) -> dict[str, Any]:
    file = folder / PROVENANCE_NAME
    if not file.is_file():
        return {}
    try:
        provenance = json.loads(file.read_bytes())
        if not isinstance(provenance, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ConvertError(f"{file}: damaged ({error}); fetch it again, or remove it to count from step 0") from None
    return provenance


def main(args: argparse.Namespace) -> int:
    """Exit code 2: refused, with the remedy."""
    from megatron_patch.train.checkpoint.write import write_weights

    try:
        source = ImportedModel(args.folder, recipe_of(args.folder, args.recipe))
        write_weights(source, args.checkpoint)
    except ValueError as error:  # ConvertError, CheckpointError, RecipeError
        print(f"refused: {error}", file=sys.stderr)
        return 2
    print(f"{args.checkpoint}: written from {args.folder} ({source.form})", file=sys.stderr)
    return 0
