"""A recipe on a number of nodes, and what follows: seconds, days, failures, memory, storage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data_tools.dataset.format import MANIFEST_NAME, NUM_SEGMENTS, DatasetManifest
from data_tools.dataset.images import images_per_row
from megatron_patch.launch import check_rank_map
from megatron_patch.model import counts
from megatron_patch.parallel.gpus import GIB, Gpu
from megatron_patch.plan.hardware import Hardware
from megatron_patch.plan.memory import Place, memory
from megatron_patch.plan.network import Traffic, traffic
from megatron_patch.plan.step import Ranks, Step, slowest_stage
from megatron_patch.recipe import Recipe

# Of Amber's released segments.
ROWS_PER_SEGMENT = 1_706_976
# CUDA context, NCCL's buffers, cuBLAS workspaces, the allocator's fragments.
RESERVED = 4 * GIB
# Mean hours between failures of one GPU's share: 7.9 h at 1,024 GPUs (Kokolis et al. 2024, Revisiting Reliability).
GPU_HOURS_BETWEEN_FAILURES = 7.9 * 1024


@dataclass(frozen=True)
class Plan:
    settings: Recipe
    hardware: Hardware
    places: tuple[Place, ...]  # one rank of each pipeline stage
    segments: int
    rows: int  # of a segment
    restart_minutes: float = 0.0

    @classmethod
    def of(cls, settings: Recipe, hardware: Hardware, restart_minutes: float = 0.0) -> Plan:
        """Raises ValueError where the layout does not divide the ranks, or how long the run is cannot be known."""
        p = settings.parallel
        ranks, model_ranks = hardware.ranks, p.tensor * p.pipeline
        check_rank_map(p.tensor, hardware.gpu.per_node)
        if ranks % model_ranks:
            raise ValueError(
                f"{ranks} GPUs / (parallel.tensor {p.tensor} x parallel.pipeline {p.pipeline}) = "
                f"{ranks / model_ranks:g}: use a number of nodes that divides"
            )
        segments, rows, images = _data_set(settings)
        if not settings.run.steps and settings.batch.global_batch_size > rows:
            raise ValueError(
                f"batch.global_batch_size {settings.batch.global_batch_size} is more than the {rows} rows of a "
                "segment, so there is no whole batch; lower it, or set run.steps for data of your own"
            )
        places = tuple(Place(settings, ranks // model_ranks, stage, images) for stage in range(p.pipeline))
        return cls(settings, hardware, places, segments, rows, restart_minutes)

    @property
    def gpu(self) -> Gpu:
        return self.hardware.gpu

    @property
    def ranks(self) -> int:
        return self.hardware.ranks

    @property
    def tokens_per_step(self) -> int:
        return self.settings.batch.global_batch_size * self.settings.model.sequence_length

    @property
    def steps(self) -> int:
        """Steps of the recipe; every whole batch of all segments in every epoch where it does not say."""
        a_segment = self.rows // self.settings.batch.global_batch_size
        return self.settings.run.steps or a_segment * self.segments * self.settings.data.epochs

    @property
    def unpadded_share(self) -> float:
        """Rows that are trained on among all that ranks compute; the rest are padding of zero weight."""
        computed = self.places[0].micro_batches * self.settings.batch.micro_batch_size * self.places[0].data_size
        return self.settings.batch.global_batch_size / computed

    @cached_property
    def step(self) -> Step:
        return slowest_stage(self.places, self.gpu, self.hardware.mfu)

    @property
    def tokens_per_second(self) -> float:
        """Of the job."""
        return self.tokens_per_step / self.step.seconds

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation of whole steps: applied layers, causal, no recomputation, dense bf16 peak."""
        rows = self.settings.batch.global_batch_size / self.step.seconds
        return counts.flops_per_row(self.settings, self.images_per_row) * rows / (self.ranks * self.gpu.peak_flops)

    @property
    def images_per_row(self) -> float:
        return self.places[0].images_per_row

    @property
    def days(self) -> float:
        return self.steps * self.step.seconds / 86400

    @property
    def gpu_hours(self) -> float:
        return self.days * 24 * self.ranks

    @property
    def failures(self) -> float:
        return self.gpu_hours / GPU_HOURS_BETWEEN_FAILURES

    @property
    def save_interval(self) -> float:
        """Seconds between restart checkpoints; infinite where there are none."""
        c = self.settings.checkpoint
        return min(c.interval_minutes * 60 or math.inf, c.interval_steps * self.step.seconds or math.inf)

    @property
    def save_seconds(self) -> float | None:
        """Seconds until a restart checkpoint is durable: every node writes its share. None: the disk is not known."""
        disk = self.hardware.disk
        return None if disk is None else self.checkpoint_bytes[0] / self.hardware.nodes / disk.write

    @property
    def row_bytes_per_second(self) -> float:
        """Of rows, that a node reads."""
        rows = self.tokens_per_second / self.settings.model.sequence_length
        return 2 * self.settings.row_length * rows / self.hardware.nodes

    def warnings(self) -> list[str]:
        """What the disk does not keep up with, and what to do."""
        disk, seconds, found = self.hardware.disk, self.save_seconds, []
        if seconds is not None and seconds > self.save_interval:
            found.append(
                f"a save takes {seconds:,.0f} s and the next one begins after {self.save_interval:,.0f}, so training "
                "waits for the disk; raise checkpoint.interval_steps or interval_minutes, or name a faster run.folder"
            )
        if disk is not None and disk.read is not None and self.row_bytes_per_second > disk.read:
            found.append(
                f"a node needs rows at {self.row_bytes_per_second / 1e6:,.2f} MB/s and reads {disk.read / 1e6:,.2f}; "
                "stage the data on a faster disk"
            )
        return found

    @property
    def effective_share(self) -> float:
        """Share of the wall time that ends up in the weights: half an interval and a restart are lost a failure."""
        lost = self.failures * (min(self.save_interval / 60, self.days * 1440) / 2 + self.restart_minutes)
        return self.days * 1440 / (self.days * 1440 + lost)

    @property
    def needed(self) -> int:
        """Bytes of the fullest GPU."""
        return max(memory(place).total for place in self.places) + RESERVED

    def summary(self) -> dict[str, Any]:
        """What a run can be held against (run/planned.py)."""
        return {"hardware": str(self.hardware), "ranks": self.ranks, "tokens_per_second": self.tokens_per_second}

    def traffic(self) -> list[tuple[Traffic, float]]:
        """What the busiest rank of any stage exchanges in a step, by kind, and its seconds on the wire."""
        items: dict[tuple[str, str, str], tuple[Traffic, float]] = {}
        for place in self.places:
            ranks = Ranks(place, self.gpu)
            for item in traffic(place):
                key = (item.group, item.what, item.operation)
                if key not in items or item.sent > items[key][0].sent:
                    items[key] = item, ranks.of(item)
        return list(items.values())

    @property
    def checkpoint_bytes(self) -> tuple[int, int]:
        """A restart checkpoint (weights, fp32 master where weights are bf16, both moments), and weights alone.

        Frozen parts are no smaller: their moments are written as zeros.
        """
        unique = counts.parameters(self.settings.model).unique
        weight, state = (2, 14) if self.settings.precision == "bf16" else (4, 12)
        return unique * state, unique * weight

    @property
    def milestones(self) -> tuple[int, int]:
        """Milestones in all, and those of them that hold the optimizer too."""
        c = self.settings.checkpoint
        every = c.milestone_steps
        if every is None:
            every = self.rows // self.settings.batch.global_batch_size
        whole = self.steps // every if every else 0
        total = whole + bool(every and self.steps % every)  # a last step is one, whatever its number
        return total, whole // c.full_milestone_every if c.full_milestone_every else 0


def _data_set(settings: Recipe) -> tuple[int, int, float]:
    """Segments, rows of each, images of each row: of the recipe's data set where it is built, else of Amber as
    published, and as many images as a row holds.

    Raises ValueError where a recipe for conversations names none that are built, nor a number of steps.
    """
    folder, vision = settings.data.folder, settings.model.vision
    if folder is not None and (folder / MANIFEST_NAME).is_file():
        manifest = DatasetManifest.read(folder / MANIFEST_NAME)
        return manifest.num_segments, manifest.rows_per_segment, manifest.images_in_a_row
    if settings.data.reset_at_starts and not settings.run.steps:
        raise ValueError(
            f"data.folder {folder}: holds no conversations yet, so nobody knows for how many steps; build them with "
            f"data_tools/{'build_chat' if vision is None else 'build_vision'}.py, or set run.steps"
        )
    return NUM_SEGMENTS, ROWS_PER_SEGMENT, 0.0 if vision is None else images_per_row(settings.row_length, vision.tokens)
