"""Weight gradients: exact against float64, and the way they are accumulated chosen by numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.kernels import check, choice, weight_gradient
from tests.kernels.test_elementwise import SHAPES

CPU = torch.device("cpu")


@SHAPES
@given(tokens=st.integers(1, 70), width=st.integers(1, 50), out=st.integers(1, 50), uses=st.integers(1, 22))
def test_many_uses_add_up_in_fp32(where, tokens, width, out, uses):
    torch.manual_seed(tokens)
    main_grad = torch.zeros(out, width, device=where)
    exact = torch.zeros(out, width, dtype=torch.float64)
    for _ in range(uses):
        x, dy = torch.randn(tokens, width).bfloat16(), torch.randn(tokens, out).bfloat16()
        weight_gradient.wgrad_gemm_accum_fp32(x.to(where), dy.to(where), main_grad)
        exact += dy.double().t() @ x.double()
    assert (main_grad.cpu().double() - exact).norm() < 1e-6 * exact.norm()


def in_bf16(x, dy, main_grad):
    main_grad.copy_((main_grad.bfloat16() + dy.t() @ x).float())


def unknown(x, dy, main_grad):
    raise TypeError("addmm() got an unexpected keyword argument 'out_dtype'")


@pytest.fixture
def ways(monkeypatch):
    """The ways to choose from, to be replaced by a test."""
    monkeypatch.setattr(weight_gradient, "_on_gpu", weight_gradient.in_the_gemm)

    def replace(**ways):
        monkeypatch.setattr(weight_gradient, "ON_GPU", ways)

    return replace


def test_the_first_way_that_is_right_is_taken(ways):
    ways(first=in_bf16, second=unknown, third=weight_gradient.widened)
    with pytest.warns(UserWarning, match="by third: first: off by .* does not add in fp32; second: TypeError: addmm"):
        assert choice.choose_weight_gradient(CPU) == "third"
    assert weight_gradient._on_gpu is weight_gradient.widened


def test_no_right_way_is_an_error(ways):
    ways(first=in_bf16, second=unknown)
    with pytest.raises(choice.KernelError, match="cannot be accumulated in fp32 here: first: off by"):
        choice.choose_weight_gradient(CPU)


def test_a_right_way_is_silent(ways, recwarn):
    ways(only=weight_gradient.widened)
    assert choice.choose_weight_gradient(CPU) == "only" and not recwarn


def test_torch_has_the_gemms_that_a_gpu_uses():
    # Their kernels are CUDA's alone; that this torch declares them is what can be seen without a GPU.
    names = {a.name for a in torch.ops.aten.addmm.dtype_out._schema.arguments}
    assert names >= {"self", "mat1", "mat2", "out_dtype", "out"}
    assert "out_dtype" in {a.name for a in torch.ops.aten.mm.dtype._schema.arguments}
    for way in (weight_gradient.in_the_gemm, weight_gradient.beside_the_gemm):
        assert "NotImplementedError" in str(check.weight_gradient_difference(way, CPU)), "known, but not for a CPU"
