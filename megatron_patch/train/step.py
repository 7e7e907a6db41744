"""One optimizer step: every micro-batch through Megatron's schedule, reduce, clip, update; nothing waits for the host.

The loss is the sum over the global batch divided by its labels, never a mean of means: each micro-batch's summed loss
is divided by the labels that count in the whole global batch, rows of zero weight pad ranks that fall short, and
gradients are summed, so the result does not depend on how rows are sharded across ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_patch.data.loader import BatchShard
from megatron_patch.data.marks import boundaries
from megatron_patch.model.build import build
from megatron_patch.model.gpt import Conversations, MobiLlama
from megatron_patch.model.initialise import initialise
from megatron_patch.optim.zero import ShardedOptimizer
from megatron_patch.parallel import device
from megatron_patch.parallel.topology import Topology
from megatron_patch.recipe import Recipe, Vision
from megatron_patch.train.watchdog import Ceiling
from megatron_patch.vision.images import Pictures


class StepResult(NamedTuple):
    """Equal on every rank."""

    loss: float  # nats a token, mean over the global batch
    grad_norm: float  # global norm before clipping
    request: float  # sum of the ranks' `request` arguments
    joules: float  # drawn by all GPUs since the update before; infinite where that of any is not known
    applied: bool  # False where the update was withheld: weights and moments are those before the step


class Step:
    """A step whose work is queued on the device and whose numbers are on their way to the host."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers = device.download(numbers)
        self.end = device.Moment()

    def result(self) -> StepResult:
        """Waits for the step's end."""
        self.end.wait()
        loss, norm_squared, request, joules, withheld = self._numbers.tolist()
        return StepResult(loss, norm_squared**0.5, request, joules, not withheld)


class Trainer:
    """The model and optimizer of this rank under one recipe and topology."""

    def __init__(self, recipe: Recipe, topology: Topology, micro_batches: int) -> None:
        """`micro_batches` is the number each data-parallel rank runs a step (megatron_patch.data.sharding)."""
        self.recipe, self.topology, self.micro_batches = recipe, topology, micro_batches
        self.chunks = build(recipe, device.current())
        initialise(self.chunks, recipe.model, recipe.seed, topology.tensor_rank, topology.tensor_size)
        self.optimizer = ShardedOptimizer(self.chunks, recipe, topology, micro_batches)
        self._schedule = get_forward_backward_func()
        self._loss = torch.zeros(())  # this rank's part of the step's loss, from `compute` to `update`

    def compute(self, shard: BatchShard) -> device.Moment:
        """Forward and backward of this rank's shard of one global batch, and the reduction of gradients.

        Returns the moment at which this rank begins to wait for the others. Weights stay as they are: what was
        computed may be dropped, by all ranks alike, by computing another shard.
        """
        self.optimizer.clear_gradients()
        self._loss = self._run(shard, shard.labels, forward_only=False)
        computed = device.Moment()
        self.optimizer.reduce_gradients()
        return computed

    def update(
        self,
        learning_rate: float,
        request: float = 0.0,
        ceiling: Ceiling | None = None,
        joules: float = math.inf,
    ) -> Step:
        """Update the weights from what `compute` left, unless loss or norm is not finite or above the ceiling.

        The device decides, equally on every rank, and the host waits for nothing: the numbers are read from the
        result, while the device computes the next step. `request` and `joules` (of this rank's GPU, infinite where not
        known) travel with the loss in the step's one world-wide reduction, so that all ranks learn from the same step
        that any of them was asked to stop.
        """
        of_host = (torch.full_like(self._loss, number) for number in (request, joules))
        sums = torch.stack([self._loss, self.optimizer.local_norm_squared(), *of_host])
        dist.all_reduce(sums)
        loss, norm = sums[0], sums[1].sqrt()
        withheld = ~(loss.isfinite() & norm.isfinite())
        if ceiling is not None:  # in fp64, as the host compares
            withheld |= loss.double() - ceiling.mean > ceiling.margin
        withheld = withheld.float()
        clip = self.recipe.optimizer.clip_grad_norm / (norm + 1e-6)
        self.optimizer.step(learning_rate, clip.clamp(max=1.0), withheld)
        return Step(torch.cat([sums, withheld[None]]))

    def step(self, shard: BatchShard, learning_rate: float) -> StepResult:
        """Compute and update, to the end: the numbers are read, and the whole weights gathered."""
        self.compute(shard)
        result = self.update(learning_rate).result()
        self.optimizer.gather()
        return result

    @torch.no_grad()
    def held_out_loss(self, shards: Iterable[BatchShard], labels: int) -> float:
        """Mean loss in nats over the `labels` of held-out rows, `shards` being this rank's; equal on every rank."""
        total = torch.zeros((), device=device.current())
        for shard in shards:
            total += self._run(shard, labels, forward_only=True)
        dist.all_reduce(total)
        return total.item()

    def _run(self, shard: BatchShard, labels: int, forward_only: bool) -> torch.Tensor:
        """This rank's part of the loss, the sum over counted labels divided by `labels`.

        An fp32 scalar; 0 unless last stage and first tensor rank.
        """
        batches = micro_batches(shard, labels, self.recipe)
        losses = self._schedule(
            forward_step_func=_forward_step,
            data_iterator=[iter(batches) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(batches),
            # model/gpt.py: tokens lie row after row
            seq_length=shard.tokens.shape[1] * self.recipe.model.sequence_length,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        if losses and self.topology.tensor_rank == 0:
            return torch.stack(losses).sum()
        return torch.zeros((), device=device.current())


class MicroBatch(NamedTuple):
    """On the device: what one forward pass takes."""

    rows: torch.Tensor  # int64 [b, s + 1]
    coefficients: torch.Tensor  # fp32 [b, s] of the labels; [b, 1] where those of a row are equal
    conversations: Conversations | None
    pictures: Pictures | None


def micro_batches(shard: BatchShard, labels: int, recipe: Recipe) -> list[MicroBatch]:
    """A rank's shard on its way to the device; each label's loss is divided by `labels`."""
    rows = device.upload(torch.from_numpy(shard.tokens.astype(np.int64)))
    coefficients = (shard.weights / np.float32(labels))[:, :, None]
    if shard.marks is None:
        places: Iterable[Conversations | None] = [None] * len(rows)
    else:
        coefficients = coefficients * shard.marks.counted[:, :, 1:]
        if recipe.data.reset_at_starts:
            places = map(_conversations, shard.marks.starts[:, :, :-1])
        else:
            places = [None] * len(rows)
    uploaded = device.upload(torch.from_numpy(coefficients))
    pictures = _pictures(shard, recipe.model.vision)
    return [MicroBatch(*batch) for batch in zip(rows, uploaded, places, pictures, strict=True)]


def _pictures(shard: BatchShard, vision: Vision | None) -> list[Pictures | None]:
    """Of each micro-batch its images, where this rank has read them and there are some."""
    if vision is None or shard.pixels is None:
        return [None] * len(shard.tokens)
    return [
        Pictures(
            device.upload(torch.from_numpy(pixels)),
            device.upload(torch.from_numpy(np.flatnonzero(tokens[:, :-1] == vision.placeholder_id))),
        )
        if len(pixels)
        else None
        for pixels, tokens in zip(shard.pixels, shard.tokens, strict=True)
    ]


def _conversations(starts: np.ndarray) -> Conversations:
    cumulative, positions = boundaries(starts)
    return Conversations(
        device.upload(torch.from_numpy(cumulative)),
        device.upload(torch.from_numpy(positions)),
        int(np.diff(cumulative).max()),
    )


def _forward_step(
    batches: Iterator[MicroBatch], model: MobiLlama
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, ...]]]:
    rows, coefficients, conversations, pictures = next(batches)
    inputs, labels = rows[:, :-1], rows[:, 1:]
    return model(inputs, labels, coefficients.expand(labels.shape), conversations, pictures=pictures), _as_loss


def _as_loss(loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the model's loss to (loss to differentiate, tokens counted by mcore: none, loss to log)."""
    # The schedule may scale what it differentiates in place; what is logged must be a copy.
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), loss.detach().clone()
