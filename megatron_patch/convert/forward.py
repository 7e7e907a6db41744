"""One forward pass of `transformers` and of our model on the same tokens: what no reading of a configuration shows.

Both in fp32, one after the other, so that one model at a time is in memory.
"""

from __future__ import annotations

from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch

from megatron_patch import launch
from megatron_patch.convert.imported import ImportedModel
from megatron_patch.convert.source import ConvertError
from megatron_patch.generate import load_model
from megatron_patch.parallel import device, topology

NUM_TOKENS = 64
_BOUND = 1e-3
"""Of the logits' relative difference: some 1e-5 in fp32 through 22 layers, 1e-2 and more with another arithmetic."""


def compare(model: ImportedModel) -> str:
    """A line that says how far our logits are from those of `transformers`.

    Raises ConvertError where they are another model's. Where `transformers` is not installed, the line says so.
    """
    if find_spec("transformers") is None:
        return "not compared with transformers, which is not installed (pip install -e .[eval])"
    import transformers

    size = min(NUM_TOKENS, model.recipe.model.sequence_length)
    tokens = torch.randint(model.recipe.model.vocab_size, (1, size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = _theirs(model, tokens)
        ours = _ours(model, tokens)
    if not (theirs.isfinite().all() and theirs.any()):
        raise ConvertError(
            f"{model.weights.path}: transformers computes nothing of it, logits that are zero or not finite; the "
            "weights are damaged, fetch them again"
        )
    difference = float((ours - theirs).norm() / theirs.norm())
    if not difference < _BOUND:  # neither is a NaN
        raise ConvertError(
            f"{model.weights.path}: its logits of {size} tokens differ by {difference:.1e} (relative norm) from those "
            f"of transformers {transformers.__version__}, more than {_BOUND:g}: its model computes otherwise than "
            "MobiLlama; report it with its configuration"
        )
    return f"logits of {size} tokens: {difference:.1e} (relative) from transformers {transformers.__version__}"


def _theirs(model: ImportedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Under the folder's own names and configuration. No code of the folder is run, nothing is unpickled."""
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_patch.convert.modeling_mobillama import MobiLlamaConfig, MobiLlamaForCausalLM

    kind: type[LlamaConfig] = LlamaConfig
    build: Any = LlamaForCausalLM
    if model.form == "shared":
        kind, build = MobiLlamaConfig, MobiLlamaForCausalLM
    # The tensors have the last word on KV heads, and here every one is there: none is to be tied by name. Padding may
    # have an id that only a tokenizer knows.
    settled: dict[str, Any] = {"num_key_value_heads": model.recipe.model.num_attention_heads}
    settled |= {"tie_word_embeddings": False, "pad_token_id": None, "return_dict": True}
    try:
        config = kind.from_dict({**model.weights.config, **settled, "torch_dtype": "float32", "dtype": "float32"})
        stock, info = build.from_pretrained(
            None, config=config, state_dict=model.hf_state(), dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # of a value of another type, huggingface_hub's have no common base
        raise ConvertError(
            f"{model.weights.config_file}: transformers {transformers.__version__} cannot build the model "
            f"({' '.join(str(error).split())}); mend the file, or fetch it again"
        ) from None
    if missed := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise ConvertError(f"{model.weights.path}: transformers takes other tensors than are there, e.g. {missed[0]}")
    logits: torch.Tensor = stock.eval()(tokens, use_cache=False).logits
    return logits


def _ours(model: ImportedModel, tokens: torch.Tensor) -> torch.Tensor:
    launch.setup_environment()
    recipe = model.recipe.model_copy(update={"precision": "fp32"})
    try:
        ours = load_model(recipe, lambda name: model.tensor(name).float(), timedelta(minutes=10))
        return ours(tokens.to(device.current())).float().cpu()
    finally:
        topology.destroy()
