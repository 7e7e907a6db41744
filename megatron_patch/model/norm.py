"""RMSNorm that sequence parallelism accepts."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_patch.kernels.norm import add_rms_norm, rms_norm, rms_norm_beside


class RMSNorm(torch.nn.Module):
    """weight * x / sqrt(mean(x^2) + eps), statistics in fp32 (Zhang and Sennrich 2019).

    Input and output [..., hidden]. Under sequence parallelism each tensor-parallel rank norms its own part of the
    rows, so the weight's gradient is partial and `optim/gradients.py` sums it over the tensor group. (mcore's
    wrapper of torch's norm refuses sequence parallelism, which is why this class exists.)
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def beside(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, its norm), where x goes on as a residual."""
        return rms_norm_beside(x, self.weight, self.eps)

    def after_adding(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x + residual, the norm of that sum)."""
        return add_rms_norm(x, residual, self.weight, self.eps)
