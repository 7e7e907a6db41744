"""Kernels run on the GPU where there is one, else interpreted on the CPU (TRITON_INTERPRET in tests/conftest.py)."""

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
