"""The chunked loss against float64, against the plain loss under every layout, and what it keeps in memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_patch.kernels import loss
from megatron_patch.kernels.loss import linear_cross_entropy
from megatron_patch.parallel import topology
from tests.kernels.test_elementwise import SHAPES, TOLERANCE
from tests.ranks import run_ranks
from tests.toy import toy_recipe


class OneRank:
    """Stands for the tensor group of one rank, whose collectives are never called."""

    @staticmethod
    def size():
        return 1

    @staticmethod
    def rank():
        return 0


def random_case(s, b, width, vocab, dtype, seed=0):
    """hidden, weight, labels, coefficients (some zero: padded rows) on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(s, b, width, generator=generator).to(dtype)
    weight = torch.randn(vocab, width, generator=generator).to(dtype)
    labels = torch.randint(vocab, (s, b), generator=generator)
    coefficients = torch.rand(s, b, generator=generator) * (torch.rand(s, b, generator=generator) > 0.2)
    return hidden, weight, labels, coefficients


def exact(hidden, weight, labels, coefficients):
    """Loss, d_hidden, d_weight in float64 by autograd."""
    hidden, weight = (t.detach().cpu().double().requires_grad_() for t in (hidden, weight))
    logits = (hidden @ weight.t()).flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")
    total = (losses * coefficients.flatten().double()).sum()
    total.backward()
    return total.detach(), hidden.grad, weight.grad


def relative(got, want):
    return ((got.detach().cpu().double() - want).norm() / want.norm().clamp(min=1e-30)).item()


@SHAPES
@given(
    s=st.integers(1, 9),
    b=st.integers(1, 3),
    width=st.integers(1, 40),
    vocab=st.integers(2, 5000),
    chunk=st.integers(1, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_loss_and_gradients(implementation, where, s, b, width, vocab, chunk, dtype):
    hidden, weight, labels, coefficients = random_case(s, b, width, vocab, dtype)
    want = exact(hidden, weight, labels, coefficients)
    hidden, weight = hidden.to(where).requires_grad_(), weight.to(where).requires_grad_()
    weight.main_grad = torch.ones(weight.shape, device=where)
    total = linear_cross_entropy(
        hidden, weight, labels.to(where), coefficients.to(where), tensor_group=OneRank, chunk_tokens=chunk
    )
    total.backward()
    # bf16: the logits and their gradient are rounded before the GEMMs that take them.
    tolerance = 1e-5 if dtype == torch.float32 else 3 * TOLERANCE[dtype]
    assert weight.grad is None and total.dtype == torch.float32
    assert abs(total.item() - want[0]) <= tolerance * (abs(want[0]) + coefficients.sum())
    scale = coefficients.norm().clamp(min=1e-30)  # a gradient of rows that are all but certain is itself rounding
    assert (hidden.grad.cpu().double() - want[1]).norm() < tolerance * (want[1].norm() + scale)
    assert (weight.main_grad.cpu().double() - 1 - want[2]).norm() < tolerance * (
        want[2].norm() + scale + weight.numel() ** 0.5
    )


def test_large_logits_stay_finite(implementation, where):
    logits = torch.tensor([[3.0e38, 0.0, -3.0e38], [-1e4, -1e4, -1e4]], device=where)
    maximum, exponentials, own = loss.row_statistics(logits, torch.tensor([0, 2], device=where), 0)
    assert maximum.tolist() == logits.amax(1).tolist()
    assert exponentials.tolist() == [1.0, 3.0]
    assert own.tolist() == [logits[0, 0].item(), -1e4]


def test_nan_reaches_the_loss(implementation, where):
    hidden, weight, labels, coefficients = (t.to(where) for t in random_case(2, 1, 4, 50, torch.float32))
    hidden[0, 0, 0] = float("nan")
    with torch.no_grad():
        total = linear_cross_entropy(hidden, weight, labels, coefficients + 1, tensor_group=OneRank)
    assert total.isnan()


def test_a_scaled_result_is_refused(where):
    if where.type == "cuda":
        pytest.skip("the assertion is the device's and would end every later use of the GPU by this process")
    hidden, weight, labels, coefficients = random_case(2, 1, 4, 50, torch.float32)
    weight.requires_grad_().main_grad = torch.zeros_like(weight)
    total = linear_cross_entropy(hidden.requires_grad_(), weight, labels, coefficients, tensor_group=OneRank)
    with pytest.raises(RuntimeError, match="scale `coefficients` instead"):
        (total * 2).backward()


def test_without_gradients_nothing_is_accumulated(implementation, where):
    hidden, weight, labels, coefficients = (t.to(where) for t in random_case(5, 2, 8, 50, torch.float32))
    weight.requires_grad_().main_grad = torch.zeros_like(weight)
    with torch.no_grad():
        without = linear_cross_entropy(hidden, weight, labels, coefficients, tensor_group=OneRank, chunk_tokens=3)
    assert not weight.main_grad.any()
    with_gradients = linear_cross_entropy(
        hidden.requires_grad_(), weight, labels, coefficients, tensor_group=OneRank, chunk_tokens=3
    )
    assert torch.equal(without, with_gradients.detach()) and weight.main_grad.any()


class Allocated(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that any operation returned, in bytes, by dtype."""

    def __init__(self):
        super().__init__()
        self.largest = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(t):
                self.largest[t.dtype] = max(self.largest.get(t.dtype, 0), t.numel())
        return result


def test_no_more_than_a_chunk_of_logits_exists(where):
    tokens, chunk, vocab, width = 96, 8, 512, 16
    hidden, weight, labels, coefficients = random_case(tokens, 1, width, vocab, torch.bfloat16)
    hidden, weight = hidden.to(where).requires_grad_(), weight.to(where).requires_grad_()
    weight.main_grad = torch.zeros(weight.shape, device=where)
    saved = []
    with (
        Allocated() as allocated,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t),
    ):
        linear_cross_entropy(
            hidden, weight, labels.to(where), coefficients.to(where), tensor_group=OneRank, chunk_tokens=chunk
        ).backward()
    # fp32: a chunk in the reference's arithmetic, or the weight's gradient; bf16: the same, or the hidden states.
    assert allocated.largest[torch.float32] == max(chunk * vocab, vocab * width)
    assert allocated.largest[torch.bfloat16] == max(chunk * vocab, vocab * width, tokens * width)
    assert allocated.largest[torch.float32] < tokens * vocab / 4
    assert saved == [tokens * width * 2]  # the gradient of the hidden states


def over_the_tensor_group(dtype: torch.dtype, sequence_parallel: bool, chunk: int):
    """Loss, this rank's d_hidden and d_weight; the whole case is the same on every rank."""
    sequence = ["parallel.sequence=true"] if sequence_parallel else []
    place = topology.initialize(toy_recipe("parallel.tensor=2", *sequence).parallel)
    rank, ranks = place.tensor_rank, place.tensor_size
    hidden, weight, labels, coefficients = random_case(12, 2, 16, 96, dtype)
    mine = hidden.chunk(ranks)[rank].clone() if sequence_parallel else hidden
    part = weight.chunk(ranks)[rank].clone().requires_grad_()
    part.main_grad = torch.zeros(part.shape)
    total = linear_cross_entropy(
        mine.requires_grad_(),
        part,
        labels,
        coefficients,
        tensor_group=place.tensor_group,
        sequence_parallel=sequence_parallel,
        chunk_tokens=chunk,
    )
    total.backward()
    return total.detach(), mine.grad, part.main_grad


@pytest.mark.parametrize("chunk", [5, 100])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["TP2", "TP2+SP"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_vocabulary_parallel(dtype, sequence_parallel, chunk):
    want = exact(*random_case(12, 2, 16, 96, dtype))
    answers = run_ranks(2, over_the_tensor_group, dtype, sequence_parallel, chunk)
    tolerance = 1e-6 if dtype == torch.float32 else TOLERANCE[dtype]
    assert answers[0][0] == answers[1][0]
    assert relative(answers[0][0], want[0]) < tolerance
    d_hidden = torch.cat([a[1] for a in answers]) if sequence_parallel else answers[0][1]
    assert relative(d_hidden, want[1]) < tolerance
    assert relative(torch.cat([a[2] for a in answers]), want[2]) < tolerance
    if not sequence_parallel:
        assert torch.equal(answers[0][1], answers[1][1])
