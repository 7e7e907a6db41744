"""Counters of parameters and floating point operations, from a recipe's shapes alone.

Two counters, never one: memory follows the *unique* parameters (a shared FFN is stored once), compute follows the
*applied* ones (it is used once a layer). Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from megatron_patch.model.parameters import Kind, whole_tensors
from megatron_patch.recipe import Model, Recipe
from megatron_patch.vision.shapes import flops_per_image


@dataclass(frozen=True)
class Parameters:
    """Scalars of a model by part. `attention` and `norms` are over all layers; `ffn` is one FFN.

    `vision` is encoder and projector of a model that sees.
    """

    embedding: int
    head: int
    attention: int
    ffn: int
    ffn_copies: int
    norms: int
    ffn_uses: int
    vision: int

    @property
    def unique(self) -> int:
        """Scalars stored once: what a checkpoint holds and an optimizer steps."""
        return self._once + self.ffn * self.ffn_copies

    @property
    def applied(self) -> int:
        """Scalars counted once for every use: the size of the model with the same compute and no sharing."""
        return self._once + self.ffn * self.ffn_uses

    @property
    def _once(self) -> int:
        return self.embedding + self.head + self.attention + self.norms + self.vision


def parameters(model: Model) -> Parameters:
    """Exact parameter counts (paper Table 3), of the tensors that the model has."""
    sizes = dict.fromkeys(get_args(Kind), 0)
    for whole in whole_tensors(model).values():
        sizes[whole.kind] += whole.numel()
    return Parameters(
        embedding=sizes["embedding"],
        head=sizes["head"],
        attention=sizes["attention"],
        ffn=sizes["ffn"] // model.ffn_count,
        ffn_copies=model.ffn_count,
        norms=sizes["norm"],
        ffn_uses=model.num_layers,
        vision=sizes["encoder"] + sizes["projector"],
    )


def flops_per_token(model: Model, *, trained: bool = True) -> int:
    """Floating point operations of forward and backward for one token of a full row, recomputation not counted.

    Of the decoder: an image's own are `vision.shapes.flops_per_image`.

    Forward: 2 for each applied matrix element (the embedding is a look-up), and for attention 2 x 2 x hidden for each
    visible key, of which a causal row shows sequence_length / 2 on average. Backward is twice the forward; of matrices
    that are not `trained` once, for what goes on to the encoder.
    """
    counts = parameters(model)
    matrices = counts.attention + counts.ffn * counts.ffn_uses + counts.head
    attention = model.num_layers * 4 * model.hidden_size * model.sequence_length // 2
    return (3 if trained else 2) * 2 * matrices + 3 * attention


def flops_per_row(recipe: Recipe, images: float = 0.0) -> float:
    """Those of a row with so many images, as the recipe trains: frozen parts have no weight gradients."""
    m, frozen = recipe.model, recipe.optimizer.frozen
    row = m.sequence_length * flops_per_token(m, trained="decoder" not in frozen)
    if m.vision is None:
        return row
    return row + images * flops_per_image(m.vision, m.hidden_size, encoder_trained="encoder" not in frozen)
