"""Weight gradients accumulated straight into fp32.

One shared FFN weight is used by every layer. Autograd would add the 22 bf16 gradients of one step in bf16; here every
use adds its product to one fp32 buffer inside the GEMM, so no bf16 sum and no bf16 temporary exists.
"""

from __future__ import annotations

import torch

try:  # apex's kernel, where it is installed
    from fused_weight_gradient_mlp_cuda import wgrad_gemm_accum_fp32 as _apex_accumulate
except ImportError:
    _apex_accumulate = None


def wgrad_gemm_accum_fp32(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad += grad_output^T @ total_input, products and sum in fp32.

    Shapes: total_input [tokens, in], grad_output [tokens, out], main_grad [out, in] (fp32, updated in place).
    The name and order of arguments are those of apex's `fused_weight_gradient_mlp_cuda`, which Megatron-Core calls.
    """
    if _apex_accumulate is not None and total_input.is_cuda:
        _apex_accumulate(total_input, grad_output, main_grad)
    elif total_input.is_cuda and total_input.dtype != torch.float32:
        torch.addmm(main_grad, grad_output.t(), total_input, out_dtype=torch.float32, out=main_grad)
    else:
        # A CPU has no mixed GEMM: widening first is exact, since every bf16 is an fp32.
        main_grad.addmm_(grad_output.t().float(), total_input.float())
