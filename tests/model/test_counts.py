"""Parameter and FLOP counters against published and hand-counted numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_patch import recipe
from megatron_patch.model import counts
from megatron_patch.model.parameters import stage_layers

RECIPES = Path(__file__).parents[2] / "recipes"

# embedding + head, attention, FFN (all copies), norms; counted by hand from Table 3 of the paper.
HAND_COUNTS = {
    "mobillama_05b": (131_072_000, 369_098_752, 34_603_008, 92_160),
    "mobillama_08b": (163_840_000, 576_716_800, 78_643_200, 115_200),
    "large_base": (131_072_000, 369_098_752, 761_266_176, 92_160),
    "baseline1": (65_536_000, 92_274_688, 380_633_088, 46_080),
    "baseline2": (131_072_000, 134_217_728, 276_824_064, 34_816),
}
UNIQUE = {
    "mobillama_05b": 534_865_920,
    "mobillama_08b": 819_315_200,
    "large_base": 1_261_529_088,
    "baseline1": 538_489_856,
    "baseline2": 542_148_608,
}


@pytest.mark.parametrize("name", UNIQUE)
def test_parts_and_unique_parameters_of_the_papers_models(name: str) -> None:
    model = recipe.load(RECIPES / f"{name}.yaml").model
    n = counts.parameters(model)
    assert (n.embedding + n.head, n.attention, n.ffn * n.ffn_copies, n.norms) == HAND_COUNTS[name]
    assert n.unique == UNIQUE[name]
    assert (n.applied == n.unique) == (not model.shared_ffn)


def test_sharing_saves_parameters_and_no_compute() -> None:
    shared = recipe.load(RECIPES / "mobillama_05b.yaml").model
    dedicated = recipe.load(RECIPES / "large_base.yaml").model
    assert counts.parameters(shared).applied == counts.parameters(dedicated).unique
    assert counts.flops_per_token(shared) == counts.flops_per_token(dedicated) == 7_729_053_696


@pytest.mark.parametrize(("name", "gflop"), [("mobillama_08b", 15.02), ("baseline1", 3.31), ("baseline2", 3.06)])
def test_flops_of_the_other_models(name: str, gflop: float) -> None:
    flops = counts.flops_per_token(recipe.load(RECIPES / f"{name}.yaml").model)
    assert flops / 1e9 == pytest.approx(gflop, abs=0.006)


@pytest.mark.parametrize(
    ("pipeline", "virtual", "expected"),
    [(1, 1, [22]), (2, 1, [11, 11]), (11, 1, [2] * 11), (4, 1, [5, 6, 6, 5]), (4, 2, [5, 6, 6, 5]), (2, 6, [11, 11])],
)
def test_layers_of_each_stage(pipeline: int, virtual: int, expected: list[int]) -> None:
    layout = [f"parallel.pipeline={pipeline}", f"parallel.virtual_pipeline={virtual}"]
    held = stage_layers(recipe.load(RECIPES / "mobillama_05b.yaml", layout))
    assert [len(layers) for layers in held] == expected
    assert sorted(sum(held, ())) == list(range(22))
