"""Causal attention against float64, and which library computes it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.kernels import attention, check, choice
from tests.kernels.test_elementwise import SHAPES, check_against_float64, dtypes

CPU = torch.device("cpu")


def exact(query, key, value):
    scores = torch.einsum("bqnd,bknd->bnqk", query, key) * query.shape[-1] ** -0.5
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bnqk,bknd->bqnd", scores.masked_fill(ahead, -torch.inf).softmax(-1), value)


@SHAPES
@given(b=st.integers(1, 3), s=st.integers(2, 70), heads=st.integers(1, 3), eighth=st.integers(1, 12), dtype=dtypes)
def test_attention_is_causal_and_right(where, b, s, heads, eighth, dtype):
    torch.manual_seed(s)
    inputs = [torch.randn(b, s, heads, 8 * eighth) for _ in range(3)]
    check_against_float64(attention.causal_attention, exact, inputs, dtype, where)


@pytest.fixture
def hopper(monkeypatch):
    """A machine that says it is Hopper, and a choice that is forgotten afterwards."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention, "_mixed_head_sizes", frozenset())


def test_what_cannot_run_is_said_and_not_taken(hopper):
    # cuDNN's kernels are CUDA's alone: on a CPU the check fails as it would on a GPU whose torch lacks them.
    with pytest.warns(UserWarning, match="attention of head size 80 runs as torch's, which is slower: NotImpl") as said:
        assert choice.choose_attention(CPU) == []
    assert len(said) == len(choice.MIXED_HEAD_SIZES) and attention._mixed_head_sizes == frozenset()


def test_other_generations_are_not_asked(monkeypatch, recwarn):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert choice.choose_attention(CPU) == [] and not recwarn


@pytest.mark.parametrize("deterministic", [True, False])
def test_only_a_deterministic_run_asks(deterministic, monkeypatch):
    asked = []
    monkeypatch.setattr(choice, "choose_weight_gradient", lambda _: "")
    monkeypatch.setattr(choice, "choose_attention", asked.append)
    torch.use_deterministic_algorithms(deterministic)
    try:
        choice.choose("reference", torch.device("cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [torch.device("cuda")] * deterministic


def off_by_a_tenth(query, key, value):
    return attention.by_torch(1.1 * query, key, value)


def never_twice(*heads):
    return attention.by_torch(*heads) * (1 + 1e-2 * torch.rand(()))


@pytest.mark.parametrize("wrong, fault", [(off_by_a_tenth, "answer 0 is off by"), (never_twice, "its bits differ")])
def test_a_wrong_answer_is_found(wrong, fault, monkeypatch):
    monkeypatch.setattr(attention, "by_cudnn_and_flash", attention.by_torch)
    assert check.attention_difference(64, CPU) is None
    monkeypatch.setattr(attention, "by_cudnn_and_flash", wrong)
    assert fault in check.attention_difference(64, CPU)


@pytest.mark.parametrize(
    "deterministic, head_size, dtype, mixed",
    [
        (True, 64, torch.bfloat16, True),
        (False, 64, torch.bfloat16, False),
        (True, 72, torch.bfloat16, False),
        (True, 64, torch.float32, False),
    ],
)
def test_where_cudnn_and_flash_are_mixed(deterministic, head_size, dtype, mixed, hopper, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "by_cudnn_and_flash", lambda *heads: calls.append("mixed"))
    monkeypatch.setattr(attention, "by_torch", lambda *heads: calls.append("torch"))
    attention.mix_for(frozenset({64, 80}))
    torch.use_deterministic_algorithms(deterministic)
    try:
        attention.causal_attention(*[torch.empty(1, 2, 3, head_size, dtype=dtype)] * 3)
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == ["mixed" if mixed else "torch"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN's and flash attention's kernels run on GPUs alone")
@pytest.mark.parametrize("head_size", choice.MIXED_HEAD_SIZES)
@pytest.mark.parametrize("s", [2, 127, 2048])
def test_cudnn_and_flash_on_a_gpu(s, head_size, where):
    torch.manual_seed(s)
    inputs = [torch.randn(2, s, 3, head_size) for _ in range(3)]
    torch.use_deterministic_algorithms(True)
    try:
        check_against_float64(attention.by_cudnn_and_flash, exact, inputs, torch.bfloat16, where)
    finally:
        torch.use_deterministic_algorithms(False)


@SHAPES
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    heads=st.integers(1, 3),
    eighth=st.integers(1, 12),
    dtype=dtypes,
)
def test_attention_of_sequences_side_by_side_is_that_of_each(where, lengths, heads, eighth, dtype):
    torch.manual_seed(sum(lengths))
    inputs = [torch.randn(sum(lengths), heads, 8 * eighth) for _ in range(3)]
    cumulative = torch.tensor([0, *lengths], device=where).cumsum(0).int()

    def packed(*heads):
        return attention.packed_causal_attention(*heads, cumulative, max(lengths))

    def each_exact(*heads):
        parts = zip(*(t.split(lengths) for t in heads), strict=True)
        return torch.cat([exact(*(t[None] for t in part))[0] for part in parts])

    check_against_float64(packed, each_exact, inputs, dtype, where)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention's kernels run on GPUs alone")
@pytest.mark.parametrize("head_size", [64, 80])
def test_sequences_side_by_side_on_a_gpu_take_flash_and_give_the_same_bits_twice(head_size, where, monkeypatch):
    torch.manual_seed(0)
    lengths = [1, 2048, 700, 3, 1344]  # two rows of 2,048
    cumulative = torch.tensor([0, *lengths], device=where).cumsum(0).int()
    inputs = [torch.randn(sum(lengths), 32, head_size, device=where, dtype=torch.bfloat16) for _ in range(4)]
    expected = attention.one_by_one(*inputs[:3], cumulative)
    monkeypatch.setattr(attention, "one_by_one", None)  # not what runs on a GPU
    torch.use_deterministic_algorithms(True)
    try:
        answers = []
        for _ in range(2):
            heads = [t.clone().requires_grad_() for t in inputs[:3]]
            out = attention.packed_causal_attention(*heads, cumulative, max(lengths))
            answers.append([out.detach(), *torch.autograd.grad(out, heads, inputs[3])])
    finally:
        torch.use_deterministic_algorithms(False)
    assert (answers[0][0].float() - expected.float()).abs().max() < 0.02
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
