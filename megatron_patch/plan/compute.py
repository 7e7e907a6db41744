"""Seconds that a GPU computes, from the recipe's shapes and from what a step reached on a measured card.

The shares below are those of one NVIDIA H100 (benchmarks/gpu_h100_2026-11-26.md: times of the parts of a step, and
steps at several micro-batches), as shares of what a large matrix product and a copy reach on the same card. With them
every row of that page is met within 1 % (tests/plan/test_step.py). On another card the same shares of *its* matrix
product and copy are assumed. No step of ours has been timed on an A100: what stands there for the 0.5B, 59 % MFU of the
computation alone, lies between llm-foundry's 1.3B (59.9 %, its scripts/train/benchmarking/README.md) and nanochat's
0.56B (67.5 %, its pull request 147) on 8 of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_patch.model import counts
from megatron_patch.parallel.gpus import Gpu
from megatron_patch.plan.memory import Place, saved_by_image
from megatron_patch.vision.shapes import flops_per_image

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

    attention_forward: float  # of a layer: its norms, residuals and projections too
    attention_backward: float
    ffn_forward: float
    ffn_backward: float
    layers: int
    loss: float  # logits and loss, both ways; 0 where the stage has none
    images: float  # encoder and projector, both ways; 0 where the stage has none
    update: float

    @property
    def layer_forward(self) -> float:
        return self.attention_forward + self.ffn_forward

    @property
    def layer_backward(self) -> float:
        return self.attention_backward + self.ffn_backward

    @property
    def micro_batch(self) -> float:
        return self.layers * (self.layer_forward + self.layer_backward) + self.loss + self.images

    def scaled(self, factor: float) -> Computation:
        own = {part.name: getattr(self, part.name) * factor for part in fields(self)}
        return Computation(**{**own, "layers": self.layers})


def computation(place: Place, gpu: Gpu, parameters: int) -> Computation:
    """`parameters` are the scalars that the rank's groups hold (memory.trained_groups)."""
    r, m, p = place.recipe, place.recipe.model, place.recipe.parallel
    products = gpu.matmul_flops * GEMM
    attention_weights, ffn_weights = 4 * m.hidden_size**2 // p.tensor, 3 * m.hidden_size * m.ffn_hidden_size // p.tensor
    padded = max(2 * HEAD_BLOCK, -(-m.head_dim // HEAD_BLOCK) * HEAD_BLOCK)
    share = (ATTENTION if r.run.deterministic else ATTENTION_FREE) * m.head_dim / padded
    scores = 4 * m.hidden_size * m.sequence_length / 2 / p.tensor * place.tokens / (gpu.matmul_flops * share)
    small = BYTES_A_HIDDEN * m.hidden_size * place.own_tokens / gpu.copy
    swiglu = BYTES_AN_FFN * m.ffn_hidden_size * place.tokens / p.tensor / gpu.copy
    # Backward takes twice as long as forward; of frozen weights no gradient is computed.
    trained = "decoder" not in r.optimizer.frozen
    held = BYTES_A_WEIGHT * trained
    attention = 2 * attention_weights * place.tokens / products + scores + small / 3
    ffn = 2 * ffn_weights * place.tokens / products + swiglu / 3
    again = {"none": (0.0, 0.0), "selective": (0.0, ffn), "full": (attention, ffn)}[r.recompute]
    head = m.vocab_size * m.hidden_size // p.tensor
    return Computation(
        attention_forward=attention,
        attention_backward=(1 + trained) * attention
        + (not trained) * (scores + small / 3)
        + again[0]
        + held * attention_weights / gpu.copy,
        ffn_forward=ffn,
        ffn_backward=(1 + trained) * ffn + (not trained) * swiglu / 3 + again[1] + held * ffn_weights / gpu.copy,
        layers=place.layers,
        loss=((4 + 2 * trained) * head * place.tokens / products + held * head / gpu.copy) * place.is_last,
        images=_images(place, gpu),
        update=(BYTES_A_PARAMETER + BYTES_A_STATE / place.data_size) * parameters / gpu.copy,
    )


def _images(place: Place, gpu: Gpu) -> float:
    """Seconds of a micro-batch's images on the first stage, both ways, every rank of a tensor group whole.

    At the shares of matrix products and attention that the decoder reaches, and what is kept for backward written and
    read; no encoder of ours has been timed on a GPU.
    """
    m, vision = place.recipe.model, place.recipe.model.vision
    if vision is None or not place.is_first:
        return 0.0
    images = place.images_per_row * place.recipe.batch.micro_batch_size
    encoder_trained = "encoder" not in place.recipe.optimizer.frozen
    work = flops_per_image(vision, m.hidden_size, encoder_trained=encoder_trained)
    scores = (3 if encoder_trained else 1) * vision.num_layers * 4 * (vision.grid**2 + 1) ** 2 * vision.hidden_size
    attention = ATTENTION if place.recipe.run.deterministic else ATTENTION_FREE
    products = ((work - scores) / GEMM + scores / attention) / gpu.matmul_flops
    return images * (products + 2 * saved_by_image(place) / gpu.copy)


def flops(place: Place, micro_batches: int) -> float:
    """FLOPs that count of the rows this rank computes, padding included: a share of a whole model's."""
    p = place.recipe.parallel
    rows = place.recipe.batch.micro_batch_size * micro_batches
    return counts.flops_per_row(place.recipe, place.images_per_row) * rows / (p.tensor * p.pipeline)
