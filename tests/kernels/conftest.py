"""Kernels are interpreted on the CPU, or run on a GPU under TESTS_ON_GPU=1 (tests/conftest.py)."""

import pytest
import torch

from megatron_patch.kernels import choice


@pytest.fixture
def where() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["reference", "triton"])
def implementation(request, where):
    """Every kernel of this process in one implementation, and back to the reference afterwards."""
    choice.choose(request.param, where)
    yield request.param
    choice.choose("reference", where)
