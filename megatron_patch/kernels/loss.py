"""Cross-entropy fused with the output projection, over chunks of tokens and a part of the vocabulary.

The logits of a 0.5B micro-batch of 16 rows are 4 GB in fp32, twice with their gradient. Here a chunk of tokens at a
time is projected, turned into its loss and, in place, into the gradient of its logits; that gradient is multiplied
into the hidden states' and accumulated in fp32 into the weight's at once (kernels/weight_gradient.py). No logits
outlive their chunk, none are stored in fp32, and none are computed twice: the gradient is taken in the forward pass,
which is possible because the loss is the last operation and its weights are known (the idea is Liger Kernel's,
arXiv 2410.10989, section 3.2).

Vocabulary parallelism: each tensor-parallel rank holds the logits of its part of the vocabulary; maximum, sum of
exponentials and the label's logit are combined over the tensor group, two small reductions a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_patch.kernels import registry
from megatron_patch.kernels.chunk import CHUNK_TOKENS
from megatron_patch.kernels.weight_gradient import wgrad_gemm_accum_fp32


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    coefficients: torch.Tensor,
    *,
    tensor_group: dist.ProcessGroup,
    sequence_parallel: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> torch.Tensor:
    """Sum over tokens of coefficient x cross-entropy(hidden @ weight^T, label): an fp32 scalar in nats.

    hidden [s, b, h] (its own part [s/TP, b, h] under sequence parallelism), weight [V/TP, h], labels int64 and
    coefficients fp32 [s, b], the same on every tensor-parallel rank. Equal on every tensor-parallel rank.

    Where gradients are enabled, `weight.main_grad` (fp32, like weight) has received its gradient when this returns, and
    `weight` gets none from autograd; a frozen weight has no `main_grad`. The result must therefore be differentiated as
    it is: a backward pass that hands it another gradient than 1 is an error (checked on the device, without waiting
    for it).
    """
    return _LinearCrossEntropy.apply(
        hidden, weight, labels, coefficients, tensor_group, sequence_parallel, chunk_tokens, torch.is_grad_enabled()
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        coefficients: torch.Tensor,
        group: dist.ProcessGroup,
        sequence_parallel: bool,
        chunk_tokens: int,
        differentiate: bool,
    ) -> torch.Tensor:
        ranks = group.size()
        if sequence_parallel:
            whole = hidden.new_empty((hidden.shape[0] * ranks, *hidden.shape[1:]))
            dist.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
        else:
            whole = hidden
        tokens = whole.reshape(-1, whole.shape[-1])
        # The kernels walk along both; a coefficient expanded over a row's tokens arrives with stride 0.
        labels, coefficients = labels.reshape(-1).contiguous(), coefficients.reshape(-1).contiguous()
        first_label = group.rank() * weight.shape[0]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(tokens) if differentiate else None
        buffer = tokens.new_empty((min(chunk_tokens, len(tokens)), weight.shape[0]))
        reductions = []
        for start in range(0, len(tokens), chunk_tokens):
            part = slice(start, min(start + chunk_tokens, len(tokens)))
            logits = torch.mm(tokens[part], weight.t(), out=buffer[: part.stop - part.start])
            maximum, exponentials, label_logit = row_statistics(logits, labels[part], first_label)
            if ranks > 1:
                own_maximum = maximum.clone()
                dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
                sums = torch.stack([exponentials * torch.exp(own_maximum - maximum), label_logit])
                dist.all_reduce(sums, group=group)
                exponentials, label_logit = sums.unbind()
            log_sum = maximum + torch.log(exponentials)
            total += ((log_sum - label_logit) * coefficients[part]).sum()
            if gradient is not None:
                to_logits_gradient_(logits, labels[part], first_label, log_sum, coefficients[part])
                torch.mm(logits, weight, out=gradient[part])
                if ranks > 1 and not sequence_parallel:
                    reductions.append(dist.all_reduce(gradient[part], group=group, async_op=True))
                if hasattr(weight, "main_grad"):  # a frozen one has none
                    wgrad_gemm_accum_fp32(tokens[part], logits, weight.main_grad)
        for reduction in reductions:
            reduction.wait()
        if gradient is not None:
            if sequence_parallel:
                own = torch.empty_like(hidden, memory_format=torch.contiguous_format)
                dist.reduce_scatter_tensor(own, gradient.view(whole.shape), group=group)
                gradient = own
            ctx.save_for_backward(gradient.view(hidden.shape))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        torch._assert_async(upstream == 1, "linear_cross_entropy: its result was scaled; scale `coefficients` instead")
        return ctx.saved_tensors[0], *[None] * 7


def row_statistics(
    logits: torch.Tensor, labels: torch.Tensor, first_label: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row of logits [n, V]: maximum m, sum of exp(x - m), and the logit of `label - first_label`, else 0.

    Three fp32 tensors [n].
    """
    run = registry.implementation("loss", reference_row_statistics, "triton_loss:row_statistics")
    return run(logits, labels, first_label)


def to_logits_gradient_(
    logits: torch.Tensor, labels: torch.Tensor, first_label: int, log_sum: torch.Tensor, coefficients: torch.Tensor
) -> None:
    """Replace logits [n, V] by coefficient x (exp(x - log_sum) - [column is the label]), computed in fp32."""
    run = registry.implementation("loss", reference_to_logits_gradient_, "triton_loss:to_logits_gradient_")
    run(logits, labels, first_label, log_sum, coefficients)


def reference_row_statistics(
    logits: torch.Tensor, labels: torch.Tensor, first_label: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = logits.float()
    maximum = wide.amax(dim=1)
    exponentials = (wide - maximum[:, None]).exp_().sum(dim=1)
    column, is_here = _own_column(labels, first_label, logits.shape[1])
    return maximum, exponentials, wide.gather(1, column[:, None])[:, 0] * is_here


def reference_to_logits_gradient_(
    logits: torch.Tensor, labels: torch.Tensor, first_label: int, log_sum: torch.Tensor, coefficients: torch.Tensor
) -> None:
    column, is_here = _own_column(labels, first_label, logits.shape[1])
    gradient = logits.float()  # fp32 logits themselves, a copy of others
    gradient.sub_(log_sum[:, None]).exp_()
    gradient.scatter_add_(1, column[:, None], -is_here.float()[:, None])
    logits.copy_(gradient.mul_(coefficients[:, None]))


def _own_column(labels: torch.Tensor, first_label: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The label's column in this part of the vocabulary (0 where it lies in another), and whether it lies here."""
    column = labels - first_label
    is_here = (column >= 0) & (column < columns)
    return column * is_here, is_here
