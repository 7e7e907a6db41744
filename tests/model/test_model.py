"""What is built: exact parameter counts, initialisation by name."""

import pytest
import torch

from megatron_patch.model.build import build
from megatron_patch.model.initialise import initial_value
from megatron_patch.model.parameters import local_parameters, whole_tensors
from megatron_patch.parallel import topology
from megatron_patch.recipe import load
from tests.ranks import run_ranks
from tests.toy import toy_recipe

COUNTS = {
    "mobillama_05b": 534_865_920,
    "mobillama_08b": 819_315_200,
    "large_base": 1_261_529_088,
    "baseline1": 538_489_856,
    "baseline2": 542_148_608,
}


def built_on_meta(name: str) -> dict[str, int]:
    recipe = load(f"recipes/{name}.yaml")
    topology.initialize(recipe.parallel)
    local = list(local_parameters(build(recipe, torch.device("meta")), recipe.model))
    assert all(p.is_meta for _, p in local)
    layers = recipe.model.num_layers
    return {
        "parameters": sum(p.numel() for _, p in local),
        "norms": sum(w.kind == "norm" for w, _ in local),
        "expected_norms": 2 * layers + 1,
        "as_named": {w.name for w, _ in local} == set(whole_tensors(recipe.model))
        and all(p.numel() == torch.Size(w.shape).numel() for w, p in local),
    }


@pytest.mark.parametrize("name", COUNTS)
def test_unique_parameters(name):
    built = run_ranks(1, built_on_meta, name)[0]
    assert built["parameters"] == COUNTS[name]
    assert built["norms"] == built["expected_norms"]
    assert built["as_named"]


def one_module_for_all() -> tuple[int, int]:
    recipe = toy_recipe("model.num_ffns=1", "parallel.pipeline=2", "parallel.virtual_pipeline=2")
    topology.initialize(recipe.parallel)
    chunks = build(recipe, torch.device("meta"))
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    return len({id(layer.mlp) for layer in layers}), len({id(layer.pre_mlp_layernorm.weight) for layer in layers})


def test_one_ffn_module_serves_every_layer_and_virtual_stage_of_a_rank():
    assert run_ranks(2, one_module_for_all) == [(1, 2), (1, 2)]


def test_initialisation_depends_on_seed_and_name_alone():
    wholes = whole_tensors(toy_recipe("model.num_ffns=1").model)
    embedding, fc1 = wholes["embedding.word_embeddings.weight"], wholes["ffn.linear_fc1.weight"]
    first = initial_value(embedding, 1, 0.02)
    assert torch.equal(first, initial_value(embedding, 1, 0.02))
    assert not torch.equal(first, initial_value(embedding, 2, 0.02))
    big = torch.cat([initial_value(fc1, seed, 0.02).flatten() for seed in range(20)])
    assert abs(big.mean()) < 3e-4 and abs(big.std() - 0.02) < 3e-4
    assert torch.equal(initial_value(wholes["final_layernorm.weight"], 1, 0.02), torch.ones(32))


def test_parts_of_a_gated_matrix_keep_gate_and_up_together():
    fc1 = whole_tensors(toy_recipe("model.num_ffns=1").model)["ffn.linear_fc1.weight"]
    whole = torch.arange(2 * 48 * 32.0).view(2, 48, 32)
    second = fc1.part(whole, 1, 2)
    assert torch.equal(second, torch.stack([whole[0, 24:], whole[1, 24:]]))
    assert tuple(second.shape) == fc1.part_shape(2)
