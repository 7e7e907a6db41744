"""Does an implementation of a kernel give its reference's numbers on this device? Asked once, at start.

Small shapes with odd sizes: a second or two for the Triton kernels, which are compiled once and cached on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_patch.kernels import attention, loss, norm, registry, rotary, swiglu
from megatron_patch.kernels.registry import Implementation, Kernel
from megatron_patch.kernels.weight_gradient import Accumulate

# Relative to the norm of the reference's answer, both rounded to bf16 (2^-9 each).
_TOLERANCE = 1e-2


def difference(kernel: Kernel, wish: Implementation, device: torch.device) -> str | None:
    """None where `wish` runs and agrees with the reference, else what is wrong."""
    answers: dict[Implementation, list[torch.Tensor]] = {}
    try:
        for implementation in ("reference", wish):
            with registry.forced({kernel: implementation}):
                answers[implementation] = list(CASES[kernel](device))
    except Exception as error:  # whatever a compiler may raise: its first line is the reason
        return _first_line(error)
    return _off(answers["reference"], answers[wish])


def weight_gradient_difference(accumulate: Accumulate, device: torch.device) -> str | None:
    """None where a way to accumulate weight gradients adds in fp32 and is right on this device, else what is wrong."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(96, width, generator=generator).to(device, torch.bfloat16) for width in (48, 80))
    start = torch.randn(80, 48, generator=generator).to(device)
    main_grad = start.clone()
    try:
        accumulate(x, dy, main_grad)
        off = ((main_grad.double() - (start.double() + dy.double().t() @ x.double())).norm() / main_grad.norm()).item()
    except Exception as error:  # an argument or a dtype that this torch does not know
        return _first_line(error)
    return None if off < 1e-5 else f"off by {off:.1e} of its norm: it does not add in fp32"


def attention_difference(head_size: int, device: torch.device) -> str | None:
    """None where deterministic attention by cuDNN and flash is right on this device and gives its bits twice."""
    inputs = _random(device, *[(2, 300, 3, head_size)] * 3)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.enable_grad():
            expected = list(_answer_and_gradients(attention.by_torch, inputs))
            got, again = (list(_answer_and_gradients(attention.by_cudnn_and_flash, inputs)) for _ in range(2))
    except Exception as error:  # a shape, an operator or its signature that this torch or cuDNN does not know
        return _first_line(error)
    finally:
        torch.use_deterministic_algorithms(before)
    if not all(map(torch.equal, got, again)):
        return "its bits differ from call to call"
    return _off(expected, got)


def _off(expected: list[torch.Tensor], got: list[torch.Tensor]) -> str | None:
    for i, (right, answer) in enumerate(zip(expected, got, strict=True)):
        off = ((answer.float() - right.float()).norm() / right.float().norm()).item()
        if not off < _TOLERANCE:
            return f"answer {i} is off by {off:.1e} of its norm"
    return None


def _first_line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else 'no message'}"


def _loss(device: torch.device) -> Iterator[torch.Tensor]:
    (logits,) = _random(device, (7, 1003))
    labels = torch.tensor([0, 5, 1002, 17, 3000, 999, 1], device=device)
    maximum, exponentials, label_logit = loss.row_statistics(logits, labels, 0)
    yield from (maximum, exponentials, label_logit)
    coefficients = torch.linspace(0.1, 0.7, 7, device=device)
    loss.to_logits_gradient_(logits, labels, 0, maximum + exponentials.log(), coefficients)
    yield logits


def _swiglu(device: torch.device) -> Iterator[torch.Tensor]:
    return _answer_and_gradients(swiglu.swiglu, _random(device, (7, 2 * 2501)))


def _norm(device: torch.device) -> Iterator[torch.Tensor]:
    rows = 300 if device.type == "cuda" else 40  # interpreted, a row takes 10 ms
    x, residual, weight = _random(device, (rows, 1201), (rows, 1201), (1201,))
    yield from _answer_and_gradients(lambda x, w: norm.rms_norm(x, w, 1e-5), [x, weight])
    yield from _answer_and_gradients(lambda x, w: norm.rms_norm_beside(x, w, 1e-5), [x, weight])
    yield from _answer_and_gradients(lambda x, r, w: norm.add_rms_norm(x, r, w, 1e-5), [x, residual, weight])


def _rotary(device: torch.device) -> Iterator[torch.Tensor]:
    angles = torch.arange(9.0)[:, None] * torch.linspace(1.0, 0.01, 20)
    table = torch.stack([angles.cos(), angles.sin()]).to(device)
    return _answer_and_gradients(
        lambda packed: rotary.split_and_rotate(packed, table, 3), _random(device, (2, 9, 3 * 3 * 40))
    )


CASES: dict[Kernel, Callable[[torch.device], Iterator[torch.Tensor]]] = {
    "loss": _loss,
    "swiglu": _swiglu,
    "norm": _norm,
    "rotary": _rotary,
}


def _random(device: torch.device, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for shape in shapes]


def _answer_and_gradients(function: Callable[..., Any], inputs: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    answers = function(*leaves)
    answers = answers if isinstance(answers, tuple) else (answers,)
    upstream = _random(inputs[0].device, *[tuple(t.shape) for t in answers])
    torch.autograd.backward(answers, upstream)
    yield from (t.detach() for t in answers)
    yield from (leaf.grad for leaf in leaves if leaf.grad is not None)
