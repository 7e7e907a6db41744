"""Every switch that changes speed and not the model: the same losses, norms and weights, within the stated bound."""

import functools

import pytest

from tests.ranks import run_ranks
from tests.toy import gather, toy_recipe, train_toy

STEPS = 2
# The arithmetic differs in the order of sums alone.
FP32_BOUND = 1e-6
# The interpreter cuts bf16 off where torch rounds: relative 2^-8 an operation, partly cancelling in a mean.
BF16_BOUND = 5e-3


@functools.cache
def with_reference_kernels(*overrides: str):
    answer = run_ranks(1, train_toy, list(overrides), STEPS)
    return answer[0]["losses"], answer[0]["norms"], gather(answer, toy_recipe(*overrides))


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["precision=fp32", "kernels=triton", "recompute=full"]),
        (1, ["precision=bf16", "kernels=triton", "recompute=selective"]),
        (2, ["precision=fp32", "kernels=triton", "parallel.tensor=2", "parallel.sequence=true"]),
        (2, ["precision=fp32", "kernels=triton", "parallel.pipeline=2"]),
        (1, ["precision=fp32", "kernels=compiled"]),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, list) else f"{x}",
)
def test_kernels_train_as_the_reference(ranks, overrides):
    # An odd head count and width, so that no kernel works on whole blocks.
    odd = ["model.hidden_size=24", "model.ffn_hidden_size=44", "model.num_layers=2", "batch.global_batch_size=2"]
    precision = next(o for o in overrides if o.startswith("precision"))
    bound = FP32_BOUND if precision == "precision=fp32" else BF16_BOUND
    losses, norms, weights = with_reference_kernels(precision, *odd)
    answers = run_ranks(ranks, train_toy, [*odd, *overrides], STEPS)
    for got, want in [*zip(answers[0]["losses"], losses, strict=True), *zip(answers[0]["norms"], norms, strict=True)]:
        assert abs(got - want) < bound * abs(want) * (1 if bound == FP32_BOUND else 4)
    for name, tensor in gather(answers, toy_recipe(*odd, *overrides)).items():
        assert (tensor - weights[name]).norm() < max(bound, 1e-5) * weights[name].norm(), name
