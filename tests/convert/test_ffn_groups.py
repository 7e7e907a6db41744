"""FFNs for groups of layers, exported in both forms and imported again: a table says which layer uses which."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_patch.convert.export import export
from megatron_patch.convert.forward import compare
from megatron_patch.convert.imported import ImportedModel, recipe_of
from megatron_patch.convert.source import ConvertError
from tests.convert.samples import MemoryWeights, small_recipe
from tests.convert.test_export import reference_logits
from tests.convert.test_import import equal

TABLES = {"blocks": [0, 0, 1, 1], "cycle": [0, 1, 0, 1]}


@pytest.mark.parametrize("pattern", TABLES)
def test_ffns_of_groups_there_and_back(pattern: str, tokenizer: Path, tmp_path: Path) -> None:
    ours, theirs = (
        small_recipe("model.num_layers=4", "model.num_ffns=2", f"model.ffn_pattern={p}")
        for p in sorted(TABLES, key=lambda p: p != pattern)
    )
    weights = MemoryWeights(ours)
    tokens = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(5))
    expected = reference_logits(weights, tokens)
    for form, stored in (("shared", 2), ("expanded", 4)):
        folder = tmp_path / form
        export(weights, folder, form, tokenizer)
        state = load_file(folder / "model.safetensors")
        assert sum("gate_proj" in name for name in state) == stored
        config = json.loads((folder / "config.json").read_text())
        assert config["ffn_of_layer"] == TABLES[pattern]
        assert str(TABLES[pattern]) in (folder / "README.md").read_text()
        stock, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), info
        assert (stock(tokens).logits - expected).norm() < 1e-5 * expected.norm()
        model = ImportedModel(folder, recipe_of(folder, None))
        assert equal(model, weights)
        assert "(relative) from transformers" in compare(model)
        with pytest.raises(ConvertError, match=rf"ffn_of_layer is {re.escape(str(TABLES[pattern]))}, but"):
            ImportedModel(folder, theirs)
        with pytest.raises(ConvertError, match="one for all or one each"):
            ImportedModel(folder, small_recipe("model.num_layers=4"))
        del config["ffn_of_layer"]  # as of a folder that others made: its tensors have the last word
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvertError, match=r"gate_proj\.weight differs from layer 0's, but in the recipe"):
        ImportedModel(folder, theirs)
    for i, k in enumerate(TABLES[pattern]):  # a module of several layers under its first name alone, as transformers 4
        if TABLES[pattern].index(k) != i:
            for part in ("gate", "up", "down"):
                del state[f"model.layers.{i}.mlp.{part}_proj.weight"]
    save_file(state, folder / "model.safetensors")
    model = ImportedModel(folder, ours)
    assert equal(model, weights)
    assert "(relative) from transformers" in compare(model)
