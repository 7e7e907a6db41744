"""Bytes that one rank holds, from a recipe's shapes; tests/plan/ compares them with real ranks.

What is counted follows the code: flat parameter groups padded for ZeRO (zero.py), fp32 gradients beside them
(gradients.py), and what autograd keeps of each layer under the fused kernels (model/, kernels/). Micro-batches are
counted in rows, hidden states as [tokens, hidden].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from data_tools.dataset.images import images_per_row
from megatron_patch.data.sharding import micro_batches
from megatron_patch.kernels.chunk import CHUNK_TOKENS
from megatron_patch.model.parameters import stage_layers, stages_of, whole_tensors
from megatron_patch.optim import groups
from megatron_patch.optim.groups import Replication
from megatron_patch.recipe import Recipe
from megatron_patch.vision.shapes import CHANNELS

# DeepSpeed aligns a flat group to this many elements for each data-parallel rank (nccl_start_alignment_factor).
ZERO_ALIGNMENT = 2
FP32 = 4


@dataclass(frozen=True)
class Place:
    """One rank's place in a layout: sizes of its groups and its pipeline stage."""

    recipe: Recipe
    data_size: int
    stage: int
    images_per_row: float = 0.0
    """Images of a row on average; memory is that of rows which hold as many as fit."""

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.recipe.parallel.pipeline - 1

    @property
    def layers(self) -> int:
        """Decoder layers that the stage holds, of all its virtual chunks."""
        return len(stage_layers(self.recipe)[self.stage])

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.recipe.precision == "bf16" else FP32

    @property
    def micro_batches(self) -> int:
        """Micro-batches that a rank runs a step."""
        return micro_batches(self.recipe, self.data_size)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.recipe.batch.micro_batch_size * self.recipe.model.sequence_length

    @property
    def most_images(self) -> int:
        """Images of a micro-batch at most, whose tokens this rank makes."""
        vision = self.recipe.model.vision
        if vision is None or not self.is_first:
            return 0
        return self.recipe.batch.micro_batch_size * images_per_row(self.recipe.row_length, vision.tokens)

    @property
    def hidden_bytes(self) -> int:
        """Hidden states of a micro-batch, whole."""
        return self.tokens * self.recipe.model.hidden_size * self.element

    @property
    def own_tokens(self) -> int:
        """Tokens of a micro-batch whose norms and residuals this rank holds."""
        p = self.recipe.parallel
        return self.tokens // (p.tensor if p.sequence else 1)

    @property
    def own_hidden_bytes(self) -> int:
        """Their hidden states."""
        return self.own_tokens * self.recipe.model.hidden_size * self.element


@dataclass(frozen=True)
class Group:
    """A flat parameter group of a rank, as the optimizer holds it."""

    replication: Replication
    size: int  # scalars, padded for ZeRO
    in_ffn: bool  # all of it is FFNs'
    layers: frozenset[int]  # of the stage's, from 0, after whose backward its gradients are whole; none: at the end
    turn: int  # in which its weights are gathered, from 0
    frozen: bool = False

    @property
    def during_backward(self) -> bool:
        """Its gradients can be reduced while lower layers still compute."""
        return bool(self.layers) and min(self.layers) > 0


@dataclass(frozen=True)
class _Part:
    """A tensor-parallel part of a parameter."""

    shape: tuple[int, ...]

    def numel(self) -> int:
        return math.prod(self.shape)


def parameter_groups(place: Place) -> list[Group]:
    """The groups that training forms (groups.py), from shapes alone."""
    r = place.recipe
    multiple = ZERO_ALIGNMENT * place.data_size
    position = {layer: i for i, layer in enumerate(stage_layers(r)[place.stage])}
    local = [
        (whole, _Part(whole.part_shape(r.parallel.tensor)))
        for whole in whole_tensors(r.model).values()
        if place.stage in stages_of(whole, r)
    ]
    found = groups.parameter_groups(local, r, place.stage)
    turns = {place: turn for turn, place in enumerate(groups.forward_order(found))}
    return [
        Group(
            group.replication,
            -(-group.size // multiple) * multiple,
            group.in_ffn,
            frozenset(position[layer] for layer in group.layers),
            turns[i],
            group.frozen,
        )
        for i, group in enumerate(found)
    ]


def trained_groups(place: Place) -> list[Group]:
    """Those with gradients and moments."""
    return [group for group in parameter_groups(place) if not group.frozen]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step, by part."""

    weights: int
    gradients: int  # fp32, whole, and this rank's reduced shard
    optimizer: int  # ZeRO's shard: fp32 master, of frozen weights too (zero.py), and both moments of trained ones
    activations: int  # what backward needs of all micro-batches in flight
    working: int  # beside them at the peak: in the loss, or in the backward pass of a layer

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


def memory(place: Place) -> Memory:
    flat = sum(group.size for group in parameter_groups(place))
    trained = sum(group.size for group in trained_groups(place))
    shard = trained // place.data_size
    return Memory(
        weights=flat * place.element,
        gradients=FP32 * (trained + (shard if place.data_size > 1 else 0)),
        optimizer=FP32 * (flat // place.data_size + 2 * shard),
        activations=_activations(place),
        working=max(_in_backward(place), _in_loss(place) if place.is_last else 0),
    )


def saved_by_layer(place: Place, recompute: str) -> int:
    """Bytes that autograd keeps of one layer and one micro-batch."""
    m, p = place.recipe.model, place.recipe.parallel
    hidden = place.own_hidden_bytes
    if recompute == "full":
        return hidden  # the layer's input
    statistic = FP32 * place.own_tokens  # 1 / root mean square of each token
    norms = 2 * (hidden + statistic)  # their inputs
    inputs = 2 * hidden  # of the QKV projection and of the FFN
    attention = 4 * place.hidden_bytes // p.tensor  # query, key, value; the output, which the projection reads as it is
    log_sums = FP32 * place.tokens * m.num_attention_heads // p.tensor
    ffn = 0 if recompute == "selective" else 3 * place.tokens * m.ffn_hidden_size * place.element // p.tensor
    return norms + inputs + attention + log_sums + ffn


def saved_by_image(place: Place) -> int:
    """Bytes that autograd keeps of encoder and projector for one image. `recompute` is of the decoder alone."""
    m = place.recipe.model
    v = m.vision
    if v is None:
        return 0
    # Projector: its input, beside which the classification token stays where patches are not copied into squares; what
    # the GELU takes and gives; the tokens that are put into their places.
    patches = v.grid**2 + (v.pixel_shuffle == 1)
    saved = (patches * v.hidden_size + 3 * v.tokens * m.hidden_size) * place.element
    if "encoder" in place.recipe.optimizer.frozen:
        return saved
    patches = v.grid**2 + 1
    pixels = CHANNELS * v.image_size**2 * place.element
    norm = patches * (v.hidden_size * place.element + 2 * FP32)  # its input, mean and 1 / deviation
    attention = 5 * patches * v.hidden_size * place.element + FP32 * patches * v.num_attention_heads
    # Its inputs, query, key, value, output; then fc1's input, what the activation takes, its factor, and fc2's input.
    gelu = 3 if v.activation == "quick_gelu" else 2
    mlp = patches * (v.hidden_size + gelu * v.ffn_hidden_size) * place.element
    return saved + pixels + norm + v.num_layers * (2 * norm + attention + mlp)


def chunks_in_flight(place: Place) -> int:
    """Forward passes of a model chunk whose backward has not run, at most (1F1B; interleaved where virtual)."""
    p = place.recipe.parallel
    later_stages = p.pipeline - 1 - place.stage
    if p.virtual_pipeline == 1:
        return min(later_stages + 1, place.micro_batches)
    return min(2 * later_stages + (p.virtual_pipeline - 1) * p.pipeline + 1, place.micro_batches * p.virtual_pipeline)


def _activations(place: Place) -> int:
    r = place.recipe
    per_chunk = saved_by_layer(place, r.recompute) * place.layers // r.parallel.virtual_pipeline
    ends = 0
    if place.is_last:  # the final norm's input and statistics, and the gradient that the loss already holds
        ends = 2 * place.own_hidden_bytes + FP32 * place.own_tokens
    images = saved_by_image(place) * place.most_images * min(chunks_in_flight(place), place.micro_batches)
    return per_chunk * chunks_in_flight(place) + ends + images


def _in_backward(place: Place) -> int:
    """The last layer's backward pass at the gradient of gate and up: what is recomputed of it, and that gradient."""
    m, p, recompute = place.recipe.model, place.recipe.parallel, place.recipe.recompute
    again = saved_by_layer(place, "none") - saved_by_layer(place, recompute)
    output = place.own_hidden_bytes if recompute != "none" else 0
    freed = place.own_hidden_bytes if place.is_last else 0  # the final norm's input is not needed any more
    return again + output + 2 * place.tokens * m.ffn_hidden_size * place.element // p.tensor - freed


def _in_loss(place: Place) -> int:
    """A chunk of logits and the rows they come of; under sequence parallelism all ranks' rows and their gradient."""
    m, p = place.recipe.model, place.recipe.parallel
    chunk = min(CHUNK_TOKENS, place.tokens) * m.vocab_size // p.tensor * place.element
    return chunk + place.own_hidden_bytes + (2 * place.hidden_bytes if p.sequence else 0)
