"""The ladder (benchmarks/ladder.py): arms of equal size, budgets that meet, a queue that goes on."""

import pytest

from benchmarks.ladder import SIZES, protocol_of
from data_tools.files.strict_yaml import read_yaml
from megatron_patch.recipe import RECIPES, load


def parameters_without_embeddings(model) -> int:
    """Counted here by hand: attention's four matrices, SwiGLU's three, two norms a layer and the last."""
    h, f = model.hidden_size, model.ffn_hidden_size
    ffns = model.num_ffns or model.num_layers
    return model.num_layers * (4 * h * h + 2 * h) + ffns * 3 * h * f + h


@pytest.mark.parametrize("size", read_yaml(SIZES))
def test_arms_have_as_many_parameters_as_shared(size):
    protocol = protocol_of(size)
    arms = sorted(path.stem for path in (RECIPES / "ladder").glob("*.yaml") if path.stem != "common")
    assert arms == ["narrow", "shallow", "shared", "two_ffns"]
    counted = {
        arm: parameters_without_embeddings(load(RECIPES / "ladder" / f"{arm}.yaml", protocol.settings).model)
        for arm in arms
    }
    for arm, number in counted.items():
        assert abs(number / counted["shared"] - 1) < 0.01, (arm, counted)
