"""Embedding rows whose gradients are added in fp32, straight to `main_grad`.

A micro-batch of 16 rows holds 32,768 tokens, of which a common one is thousands. torch adds the gradients of its
occurrences in the weight's dtype, on a CPU always and on a GPU for `weight[ids]`: in bf16 a sum of 4,096 like terms
ends at a fifth of what it should be. On a GPU its gradient of an embedding adds in fp32, in a fixed order where
deterministic algorithms are asked for; here its answer is fp32 too.
"""

from __future__ import annotations

from typing import Any

import torch


def embedding(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight[ids]: ids int64 [...], weight [V, h], output [..., h] in weight's dtype.

    Where weight has a `main_grad` (fp32, like weight), that receives the gradient and autograd hands none to `weight`.
    """
    if hasattr(weight, "main_grad"):
        return _Embedding.apply(ids, weight)
    return torch.nn.functional.embedding(ids, weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.main_grad = weight.main_grad  # type: ignore[attr-defined]
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, d_rows: torch.Tensor) -> tuple[None, None]:
        (ids,) = ctx.saved_tensors
        ctx.main_grad += torch.ops.aten.embedding_dense_backward(d_rows.float(), ids, len(ctx.main_grad), -1, False)
        return None, None
