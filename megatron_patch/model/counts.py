"""Counters of parameters and floating point operations, from a recipe's shapes alone.

Two counters, never one: memory follows the *unique* parameters (a shared FFN is stored once), compute follows the
*applied* ones (it is used once a layer). Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_patch.recipe import Model, Recipe


@dataclass(frozen=True)
class Parameters:
    """Scalars of a model by part. `attention` and `norms` are over all layers; `ffn` is one FFN."""

    embedding: int
    head: int
    attention: int
    ffn: int
    ffn_copies: int
    norms: int
    ffn_uses: int

    @property
    def unique(self) -> int:
        """Scalars stored once: what a checkpoint holds and an optimizer steps."""
        return self.embedding + self.head + self.attention + self.norms + self.ffn * self.ffn_copies

    @property
    def applied(self) -> int:
        """Scalars counted once for every use: the size of the model with the same compute and no sharing."""
        return self.embedding + self.head + self.attention + self.norms + self.ffn * self.ffn_uses


def parameters(model: Model) -> Parameters:
    """Exact parameter counts: untied embedding and head, MHA without biases, SwiGLU FFN, RMSNorm (paper Table 3)."""
    h = model.hidden_size
    return Parameters(
        embedding=model.vocab_size * h,
        head=model.vocab_size * h,
        attention=model.num_layers * 4 * h * h,
        ffn=3 * h * model.ffn_hidden_size,
        ffn_copies=1 if model.shared_ffn else model.num_layers,
        norms=(2 * model.num_layers + 1) * h,
        ffn_uses=model.num_layers,
    )


def flops_per_token(model: Model) -> int:
    """Floating point operations of forward and backward for one token of a full row, recomputation not counted.

    Forward: 2 for each applied matrix element (the embedding is a look-up), and for attention 2 x 2 x hidden for each
    visible key, of which a causal row shows sequence_length / 2 on average. Backward is twice the forward.
    """
    counts = parameters(model)
    matrices = counts.attention + counts.ffn * counts.ffn_uses + counts.head
    attention = model.num_layers * 4 * model.hidden_size * model.sequence_length // 2
    return 3 * (2 * matrices + attention)


def stage_layers(recipe: Recipe) -> list[int]:
    """Layers held by each pipeline stage, all of its virtual chunks together, first stage first.

    Where the layers do not divide over the chunks, embedding and loss count as a layer each: the first chunk of the
    first stage and the last chunk of the last stage hold one layer less.
    """
    p, layers = recipe.parallel, recipe.model.num_layers
    if not recipe.pads_pipeline_split:
        return [layers // p.pipeline] * p.pipeline
    held = [(layers + 2) // p.pipeline] * p.pipeline
    held[0] -= 1
    held[-1] -= 1
    return held
