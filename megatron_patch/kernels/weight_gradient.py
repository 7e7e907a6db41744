"""Weight gradients accumulated straight into fp32.

One shared FFN weight is used by every layer. Autograd would add the 22 bf16 gradients of one step in bf16; here every
use adds its product to one fp32 buffer inside the GEMM, so no bf16 sum and no bf16 temporary exists.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Accumulate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def in_the_gemm(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """One GEMM from bf16 that reads and writes the fp32 sum; torch has it for GPUs alone."""
    torch.addmm(main_grad, grad_output.t(), total_input, out_dtype=torch.float32, out=main_grad)


def beside_the_gemm(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """A GEMM from bf16 into an fp32 temporary, which is added: one pass more over the gradient, the same precision."""
    main_grad.add_(torch.mm(grad_output.t(), total_input, out_dtype=torch.float32))


def widened(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """An fp32 GEMM of widened operands, which is exact, since every bf16 is an fp32: what a CPU does."""
    main_grad.addmm_(grad_output.t().float(), total_input.float())


# The ways of a GPU, fastest first; kernels/choice.py takes the first that is right on the device at hand.
ON_GPU: dict[str, Accumulate] = {"torch.addmm": in_the_gemm, "torch.mm and a sum": beside_the_gemm, "fp32": widened}
try:  # apex's kernel, where it is installed
    from fused_weight_gradient_mlp_cuda import wgrad_gemm_accum_fp32 as _apex

    ON_GPU = {"apex": _apex, **ON_GPU}
except ImportError:
    pass

_on_gpu: Accumulate = in_the_gemm


def use(way: str) -> None:
    """Accumulate in one of the ways of `ON_GPU` from now on, on GPUs."""
    global _on_gpu
    _on_gpu = ON_GPU[way]


def wgrad_gemm_accum_fp32(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad += grad_output^T @ total_input, products and sum in fp32.

    Shapes: total_input [tokens, in], grad_output [tokens, out], main_grad [out, in] (fp32, updated in place).
    The name and order of arguments are those of apex's `fused_weight_gradient_mlp_cuda`, which Megatron-Core calls.
    """
    mixed = total_input.is_cuda and total_input.dtype != torch.float32
    (_on_gpu if mixed else widened)(total_input, grad_output, main_grad)
