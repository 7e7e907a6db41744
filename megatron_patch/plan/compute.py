"""Seconds that a GPU computes, from the recipe's shapes and from what a step reached on a measured card.

The shares below are those of one NVIDIA H100 (benchmarks/gpu_h100_2026-11-26.md: times of the parts of a step, and
steps at several micro-batches), as shares of what a large matrix product and a copy reach on the same card. With them
every row of that page is met within 1 % (tests/plan/test_step.py). On another card the same shares of *its* matrix
product and copy are assumed. No step of ours has been timed on an A100: what stands there for the 0.5B, 59 % MFU of the
computation alone, lies between llm-foundry's 1.3B (59.9 %, its scripts/train/benchmarking/README.md) and nanochat's
0.56B (67.5 %, its pull request 147) on 8 of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_patch.model import counts
from megatron_patch.parallel.gpus import Gpu
from megatron_patch.plan.memory import Place

GEMM = 0.917
"""Of the matrix product's rate: projections, FFN and logits."""
ATTENTION, ATTENTION_FREE = 0.225, 0.296
"""Of the matrix product's rate, heads of 64, causal: fixed bits, and without that promise."""
HEAD_BLOCK = 32
"""Heads are padded to a multiple of this, and cost no less than heads of 64."""
BYTES_A_HIDDEN, BYTES_AN_FFN = 55, 22
"""Of a token and layer, for each scalar of width: norms, residuals, rotary; SwiGLU."""
BYTES_A_WEIGHT = 17
"""Of a micro-batch, for each use of a weight: it is read twice, its fp32 gradient read and written, and padding."""
BYTES_A_PARAMETER, BYTES_A_STATE = 4, 62
"""Of a step: the gradient is cleared; norm, clipping and AdamW of this rank's shard."""


@dataclass(frozen=True)
class Computation:
    """Seconds of one pipeline stage's own work on a rank: of a micro-batch, and once a step."""

    layer_forward: float
    layer_backward: float
    layers: int
    loss: float  # logits and loss, both ways; 0 where the stage has none
    update: float

    @property
    def micro_batch(self) -> float:
        return self.layers * (self.layer_forward + self.layer_backward) + self.loss

    def scaled(self, factor: float) -> Computation:
        return Computation(
            self.layer_forward * factor,
            self.layer_backward * factor,
            self.layers,
            self.loss * factor,
            self.update * factor,
        )


def computation(place: Place, gpu: Gpu, parameters: int) -> Computation:
    """`parameters` are the scalars that the rank's groups hold (memory.parameter_groups)."""
    r, m, p = place.recipe, place.recipe.model, place.recipe.parallel
    products = gpu.matmul_flops * GEMM
    ffn_weights = 3 * m.hidden_size * m.ffn_hidden_size // p.tensor
    weights = 4 * m.hidden_size**2 // p.tensor + ffn_weights
    ffn = 2 * ffn_weights * place.tokens / products
    padded = max(2 * HEAD_BLOCK, -(-m.head_dim // HEAD_BLOCK) * HEAD_BLOCK)
    share = (ATTENTION if r.run.deterministic else ATTENTION_FREE) * m.head_dim / padded
    attention = 4 * m.hidden_size * m.sequence_length / 2 / p.tensor * place.tokens / (gpu.matmul_flops * share)
    swiglu = BYTES_AN_FFN * m.ffn_hidden_size * place.tokens / p.tensor / gpu.copy
    small = (BYTES_A_HIDDEN * m.hidden_size * place.own_tokens / gpu.copy + swiglu) / 3
    forward = 2 * weights * place.tokens / products + attention + small
    again = {"none": 0.0, "selective": ffn + swiglu / 3, "full": forward}[r.recompute]
    head = m.vocab_size * m.hidden_size // p.tensor
    return Computation(
        layer_forward=forward,
        layer_backward=2 * forward + again + BYTES_A_WEIGHT * weights / gpu.copy,
        layers=place.layers,
        loss=(6 * head * place.tokens / products + BYTES_A_WEIGHT * head / gpu.copy) * place.is_last,
        update=(BYTES_A_PARAMETER + BYTES_A_STATE / place.data_size) * parameters / gpu.copy,
    )


def flops(place: Place, micro_batches: int) -> float:
    """FLOPs that count of the rows this rank computes, padding included: a share of a whole model's."""
    p = place.recipe.parallel
    return counts.flops_per_token(place.recipe.model) * place.tokens * micro_batches / (p.tensor * p.pipeline)
