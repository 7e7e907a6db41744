"""SwiGLU, RMSNorm and rotary embedding against float64, under random shapes, forward and backward."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_patch.kernels import norm, rotary, swiglu

# bf16 keeps 8 bits; Triton's interpreter cuts off where a GPU rounds, so one unit in the last place is allowed.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}

SHAPES = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


def check_against_float64(kernel, exact, inputs, dtype, where):
    """Outputs and gradients of `kernel` (inputs in dtype) against autograd through `exact` (the same, in float64)."""
    ours = [x.to(where, dtype).requires_grad_() for x in inputs]
    theirs = [x.detach().cpu().double().requires_grad_() for x in ours]
    outputs, expected = kernel(*ours), exact(*theirs)
    if torch.is_tensor(outputs):
        outputs, expected = (outputs,), (expected,)
    upstream = [torch.randn(e.shape).to(dtype) for e in expected]
    torch.autograd.backward(outputs, [u.to(where) for u in upstream])
    torch.autograd.backward(expected, [u.double() for u in upstream])
    pairs = [*zip(outputs, expected, strict=True), *((o.grad, t.grad) for o, t in zip(ours, theirs, strict=True))]
    for got, want in pairs:
        assert got.dtype == dtype and got.shape == want.shape
        error = (got.detach().cpu().double() - want.detach()).norm() / want.norm().clamp(min=1e-30)
        assert error < TOLERANCE[dtype]


@SHAPES
@given(rows=st.integers(1, 9), width=st.integers(1, 2500), dtype=dtypes)
def test_swiglu(implementation, where, rows, width, dtype):
    torch.manual_seed(width)

    def exact(packed):
        gate, up = packed.chunk(2, -1)
        return gate / (1 + torch.exp(-gate)) * up

    check_against_float64(swiglu.swiglu, exact, [torch.randn(rows, 2, 2 * width)], dtype, where)


def exact_norm(x, weight):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)


@SHAPES
@given(rows=st.integers(1, 9), width=st.integers(2, 2500), dtype=dtypes)
def test_rms_norm(implementation, where, rows, width, dtype):
    torch.manual_seed(width)
    inputs = [torch.randn(rows, 2, width), torch.randn(width)]
    check_against_float64(lambda x, w: norm.rms_norm(x, w, 1e-5), exact_norm, inputs, dtype, where)


@SHAPES
@given(rows=st.integers(1, 9), width=st.integers(2, 2500), dtype=dtypes)
def test_rms_norm_beside(implementation, where, rows, width, dtype):
    torch.manual_seed(width)
    inputs = [torch.randn(rows, 2, width), torch.randn(width)]

    def exact(x, weight):
        return x, exact_norm(x, weight)

    check_against_float64(lambda x, w: norm.rms_norm_beside(x, w, 1e-5), exact, inputs, dtype, where)


@SHAPES
@given(rows=st.integers(1, 9), width=st.integers(2, 2500), dtype=dtypes)
def test_add_rms_norm(implementation, where, rows, width, dtype):
    torch.manual_seed(width)
    inputs = [torch.randn(rows, 2, width), torch.randn(rows, 2, width), torch.randn(width)]

    def exact(x, residual, weight):
        return x + residual, exact_norm(x + residual, weight)

    check_against_float64(lambda x, r, w: norm.add_rms_norm(x, r, w, 1e-5), exact, inputs, dtype, where)


@SHAPES
@given(s=st.integers(1, 9), b=st.integers(1, 3), heads=st.integers(1, 5), half=st.integers(1, 40), dtype=dtypes)
def test_split_and_rotate(implementation, where, s, b, heads, half, dtype):
    torch.manual_seed(half)
    angles = torch.arange(s)[:, None].double() * 10000.0 ** (-torch.arange(half).double() / half)
    table = torch.stack([angles.cos(), angles.sin()])

    def exact(packed):
        query, key, value = packed.view(b, s, heads, 6 * half).chunk(3, -1)
        turn = torch.polar(torch.ones_like(angles), angles)[None, :, None, :]

        def turned(x):
            z = torch.complex(x[..., :half], x[..., half:]) * turn
            return torch.cat([z.real, z.imag], -1)

        return turned(query), turned(key), value

    check_against_float64(
        lambda packed: rotary.split_and_rotate(packed, table.float().to(where), heads),
        exact,
        [torch.randn(b, s, heads * 6 * half)],
        dtype,
        where,
    )


def test_gradients_that_are_not_contiguous(implementation, where):
    # Attention returns the gradients of q, k and v as views of [b, heads, s, d].
    table = torch.randn(2, 4, 3, device=where)
    packed = torch.randn(2, 4, 36, device=where, requires_grad=True)
    parts = rotary.split_and_rotate(packed, table, 2)
    upstream = [torch.randn(2, 2, 4, 6, device=where) for _ in parts]
    torch.autograd.backward(parts, [u.transpose(1, 2) for u in upstream])
    from_views = packed.grad.clone()
    packed.grad = None
    parts = rotary.split_and_rotate(packed, table, 2)
    torch.autograd.backward(parts, [u.transpose(1, 2).contiguous() for u in upstream])
    assert torch.equal(from_views, packed.grad)


def test_swiglu_saves_its_input_alone(where):
    from megatron_patch.kernels import choice

    choice.choose("triton", where)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        packed = torch.randn(64, 200, device=where, requires_grad=True)
        swiglu.swiglu(packed)
    choice.choose("reference", where)
    assert saved == [packed.nbytes]


@pytest.mark.parametrize("wrong", ["nan", "scale"])
def test_a_kernel_that_is_wrong_is_refused(monkeypatch, where, wrong):
    from megatron_patch.kernels import choice, registry, triton_swiglu

    def broken(packed):
        return packed.chunk(2, -1)[0] * (float("nan") if wrong == "nan" else 1.0)

    monkeypatch.setattr(triton_swiglu, "swiglu", broken)
    registry.named.cache_clear()
    with pytest.raises(choice.KernelError, match="kernel swiglu cannot run here as triton: answer 0 is off by"):
        choice.choose("triton", where)
    registry.named.cache_clear()
    assert set(choice.choose("reference", where).values()) == {"reference"}
