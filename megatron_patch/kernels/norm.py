"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467), alone, with the residual past it or the residual sum before."""

from __future__ import annotations

import torch

from megatron_patch.kernels import registry


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, statistics in fp32; x [..., h], weight [h]."""
    return registry.implementation("norm", reference_rms_norm, "triton_norm:rms_norm")(x, weight, eps)


def rms_norm_beside(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, rms_norm of x), where x goes on as a residual: one pass of backward gives the sum of both gradients."""
    return registry.implementation("norm", reference_rms_norm_beside, "triton_norm:rms_norm_beside")(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + residual, rms_norm of that sum), the sum rounded to x's dtype before its statistics are taken."""
    run = registry.implementation("norm", reference_add_rms_norm, "triton_norm:add_rms_norm")
    return run(x, residual, weight, eps)


def reference_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def reference_rms_norm_beside(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x, reference_rms_norm(x, weight, eps)


def reference_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return total, reference_rms_norm(total, weight, eps)
