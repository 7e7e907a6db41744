"""What a run needs, before it is submitted: `python -m megatron_patch plan RECIPE --nodes 20 --gpus a100-80g`.

Every number is computed from the recipe's shapes (counts.py, memory.py, network.py) and from assumptions that are
printed beside it; what does not fit is refused. Without a recipe, the paper's five models stand side by side.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from data_tools.dataset.format import NUM_SEGMENTS
from megatron_patch import recipe
from megatron_patch.arguments import amount, count, share
from megatron_patch.launch import check_rank_map
from megatron_patch.model import counts
from megatron_patch.paper import TABLE_1
from megatron_patch.parallel.gpus import GIB, GPUS, Gpu
from megatron_patch.plan.memory import Memory, Place, memory
from megatron_patch.plan.network import Traffic, traffic
from megatron_patch.recipe import Recipe, RecipeError

# Of Amber's released segments.
ROWS_PER_SEGMENT = 1_706_976
# CUDA context, NCCL's buffers, cuBLAS workspaces, the allocator's fragments.
RESERVED = 4 * GIB
# Mean hours between failures of one GPU's share: 7.9 h at 1,024 GPUs (Kokolis et al. 2024, Revisiting Reliability).
GPU_HOURS_BETWEEN_FAILURES = 7.9 * 1024
MODELS = ("mobillama_05b", "mobillama_08b", "large_base", "baseline1", "baseline2")


def add_cluster(parser: argparse._ActionsContainer) -> None:
    """What is planned for; `report --compare` plans for the same."""
    parser.add_argument("--nodes", type=count, default=20, help="nodes to run on (20)")
    parser.add_argument("--gpus", choices=GPUS, default="a100-80g", help="what the nodes hold (a100-80g)")
    parser.add_argument(
        "--mfu", type=share, default=0.45, help="assumed model FLOP utilisation, all waits included (0.45)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, nargs="?", help="a file of recipes/; none: the paper's models in a table")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    add_cluster(parser)
    parser.add_argument(
        "--restart-minutes", type=amount, default=5, help="assumed loss a restart, beside redone steps (5)"
    )


def main(args: argparse.Namespace) -> int:
    """Print the plan. Exit code 2: the recipe cannot be run so, with the reason."""
    if args.recipe is None:
        print(table(args.nodes, args.gpus, args.mfu))
        return 0
    try:
        settings = recipe.load(args.recipe, args.overrides)
        plan = Plan.of(settings, args.nodes, GPUS[args.gpus], args.mfu, args.restart_minutes)
    except (RecipeError, ValueError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    print(report(plan, args.gpus))
    if plan.needed > plan.gpu.memory:
        worst = max(plan.places, key=lambda place: memory(place).total)
        print(
            f"refused: stage {worst.stage} needs {plan.needed / GIB:.1f} GiB, a {args.gpus} has "
            f"{plan.gpu.memory / GIB:.1f}; lower batch.micro_batch_size, recompute more, or split the model further",
            file=sys.stderr,
        )
        return 2
    return 0


@dataclass(frozen=True)
class Plan:
    """A recipe on a number of nodes, and what follows."""

    settings: Recipe
    gpu: Gpu
    nodes: int
    mfu: float
    restart_minutes: float
    places: tuple[Place, ...]  # one rank of each pipeline stage

    @classmethod
    def of(cls, settings: Recipe, nodes: int, gpu: Gpu, mfu: float, restart_minutes: float) -> Plan:
        """Raises ValueError where the layout does not divide the ranks."""
        p = settings.parallel
        ranks, model_ranks = nodes * gpu.per_node, p.tensor * p.pipeline
        check_rank_map(p.tensor, gpu.per_node)
        if ranks % model_ranks:
            raise ValueError(
                f"{ranks} GPUs / (parallel.tensor {p.tensor} x parallel.pipeline {p.pipeline}) = "
                f"{ranks / model_ranks:g}: use a number of nodes that divides"
            )
        if not settings.run.steps and settings.batch.global_batch_size > ROWS_PER_SEGMENT:
            raise ValueError(
                f"batch.global_batch_size {settings.batch.global_batch_size} is more than the {ROWS_PER_SEGMENT} rows "
                "of a segment, so there is no whole batch; lower it, or set run.steps for data of your own"
            )
        places = tuple(Place(settings, ranks // model_ranks, stage) for stage in range(p.pipeline))
        return cls(settings, gpu, nodes, mfu, restart_minutes, places)

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpu.per_node

    @property
    def tokens_per_step(self) -> int:
        return self.settings.batch.global_batch_size * self.settings.model.sequence_length

    @property
    def steps(self) -> int:
        """Steps of the recipe; every whole batch of Amber's 360 segments where it does not say."""
        return self.settings.run.steps or ROWS_PER_SEGMENT // self.settings.batch.global_batch_size * NUM_SEGMENTS

    @property
    def dealt_share(self) -> float:
        """Rows that are trained on among all that ranks compute; the rest are padding of zero weight."""
        computed = self.places[0].micro_batches * self.settings.batch.micro_batch_size * self.places[0].data_size
        return self.settings.batch.global_batch_size / computed

    @property
    def step_seconds(self) -> float:
        flops = counts.flops_per_token(self.settings.model) * self.tokens_per_step
        return flops / (self.ranks * self.gpu.peak_flops * self.mfu * self.dealt_share)

    @property
    def days(self) -> float:
        return self.steps * self.step_seconds / 86400

    @property
    def failures(self) -> float:
        return self.days * 24 * self.ranks / GPU_HOURS_BETWEEN_FAILURES

    @property
    def effective_share(self) -> float:
        """Share of the wall time that ends up in the weights: half an interval and a restart are lost a failure."""
        c = self.settings.checkpoint
        by_time = c.interval_minutes or math.inf
        by_steps = c.interval_steps * self.step_seconds / 60 or math.inf
        lost = self.failures * (min(by_time, by_steps, self.days * 1440) / 2 + self.restart_minutes)
        return self.days * 1440 / (self.days * 1440 + lost)

    @property
    def needed(self) -> int:
        return max(memory(place).total for place in self.places) + RESERVED

    def bandwidth(self, item: Traffic) -> float:
        """Bytes/s a rank for a group's collectives: tensor groups stay inside a node."""
        return self.gpu.inside if item.group == "tensor" or self.nodes == 1 else self.gpu.outside

    @property
    def checkpoint_bytes(self) -> tuple[int, int]:
        """A restart point (weights, fp32 master where weights are bf16, both moments), and weights alone."""
        unique = counts.parameters(self.settings.model).unique
        weight, state = (2, 14) if self.settings.precision == "bf16" else (4, 12)
        return unique * state, unique * weight

    @property
    def milestones(self) -> tuple[int, int]:
        """Milestones in all, and those of them that hold the optimizer too."""
        c = self.settings.checkpoint
        every = c.milestone_steps
        if every is None:
            every = ROWS_PER_SEGMENT // self.settings.batch.global_batch_size
        total = self.steps // every if every else 0
        return total, total // c.full_milestone_every if c.full_milestone_every else 0


def report(plan: Plan, gpu_name: str) -> str:
    """The plan as text."""
    s = plan.settings
    n, p = counts.parameters(s.model), s.parallel
    first = plan.places[0]
    lines = [
        f"{s.name}: TP{p.tensor} x PP{p.pipeline} x DP{first.data_size}, ZeRO-{p.zero_stage}, {s.precision}, recompute "
        f"{s.recompute}, on {plan.nodes} nodes of {plan.gpu.per_node} {gpu_name}",
        "",
        f"parameters          {n.unique:,} unique (memory, checkpoints), {n.applied:,} applied (compute)",
        f"FLOPs               {counts.flops_per_token(s.model) / 1e9:.2f} GFLOP a token, forward and backward, causal",
        f"batch               {s.batch.global_batch_size} rows = {plan.tokens_per_step:,} tokens: "
        f"{first.micro_batches} micro-batches of {s.batch.micro_batch_size} a rank"
        + (f", {1 - plan.dealt_share:.1%} of them padding" if plan.dealt_share < 1 else ""),
        f"length              {plan.steps:,} steps, {plan.steps * plan.tokens_per_step / 1e9:,.1f}B tokens",
        "",
        *_memory_lines(plan),
        "",
        *_traffic_lines(plan),
        "",
        f"step                {plan.step_seconds:.2f} s at {plan.mfu:.0%} MFU of {plan.gpu.peak_flops / 1e12:.0f} "
        f"TFLOP/s dense bf16: {plan.tokens_per_step / plan.step_seconds / plan.ranks:,.0f} tokens/s a GPU",
        f"run                 {plan.days:.1f} days, {plan.days * 24 * plan.ranks / 1e3:.1f}K GPU hours",
        f"failures            {plan.failures:.1f} expected; effective time {plan.effective_share:.1%}",
        "",
        *_storage_lines(plan),
        "",
        "assumed             "
        f"MFU {plan.mfu:.0%}, waits for the network included; {RESERVED / GIB:.0f} GiB reserved for CUDA, NCCL and "
        f"fragments; a failure every {GPU_HOURS_BETWEEN_FAILURES:,.0f} GPU hours (7.9 h at 1,024 GPUs), each losing "
        f"half a checkpoint interval and {plan.restart_minutes:g} minutes; NVLink {plan.gpu.inside / 1e9:.0f} GB/s, "
        f"network {plan.gpu.outside / 1e9:g} GB/s a GPU and direction; ring collectives",
    ]
    return "\n".join(lines)


def _memory_lines(plan: Plan) -> list[str]:
    lines = ["GiB a GPU           weights  gradients  optimizer  activations  working   total"]
    for place in plan.places:
        m: Memory = memory(place)
        lines.append(
            f"  stage {place.stage:<11} {m.weights / GIB:8.2f} {m.gradients / GIB:10.2f} {m.optimizer / GIB:10.2f} "
            f"{m.activations / GIB:12.2f} {m.working / GIB:8.2f} {m.total / GIB:7.2f}"
        )
    lines.append(f"  with reserve {plan.needed / GIB:48.2f} of {plan.gpu.memory / GIB:.2f}")
    return lines


def _traffic_lines(plan: Plan) -> list[str]:
    lines = ["bytes a step        sent by the busiest rank                                     seconds on the wire"]
    items: dict[tuple[str, str, str], Traffic] = {}
    for place in plan.places:
        for item in traffic(place):
            key = (item.group, item.what, item.operation)
            items[key] = max(items.get(key, item), item, key=lambda i: i.sent)
    lines += [
        f"  {item.group:<9} {item.sent / GIB:8.3f} GiB  {item.operation} of {item.what} over {item.size}".ljust(76)
        + f"{item.sent / plan.bandwidth(item):7.3f}"
        for item in items.values()
    ]
    seconds = {
        hidden: sum(i.sent / plan.bandwidth(i) for i in items.values() if i.hidden == hidden)
        for hidden in (False, True)
    }
    lines.append(
        f"  {seconds[True]:.3f} s of it beside computation ({seconds[True] / max(sum(seconds.values()), 1e-9):.0%}); "
        f"{seconds[False]:.3f} s, {seconds[False] / plan.step_seconds:.1%} of a step, are waited for"
    )
    return lines


def _storage_lines(plan: Plan) -> list[str]:
    full, weights = plan.checkpoint_bytes
    keep = plan.settings.checkpoint.keep
    total, whole = plan.milestones
    kept = keep * full + whole * full + (total - whole) * weights
    data = plan.steps * plan.settings.batch.global_batch_size * plan.settings.row_length * 2
    return [
        f"restart points      {full / 1e9:.1f} GB each, {keep} kept",
        f"milestones          {total}, {weights / 1e9:.1f} GB each; {whole} of them with the optimizer",
        f"storage             {kept / 1e12:.2f} TB of checkpoints, {data / 1e12:.2f} TB of indexed data",
    ]


def table(nodes: int, gpu_name: str, mfu: float) -> str:
    """The paper's models side by side in Markdown, its Table 1 beside the exact numbers."""
    paper = {row.recipe: (row.parameters, f"{row.gpu_hours / 1e3:.1f}") for row in TABLE_1}
    lines = [
        "| model | parameters | paper | applied | GFLOP/token | GiB a GPU | days | K GPU hours | paper |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        settings = recipe.load(recipe.RECIPES / f"{name}.yaml")
        # All over the same 1.26T tokens, as Table 1 has it.
        steps = ROWS_PER_SEGMENT // settings.batch.global_batch_size * NUM_SEGMENTS
        settings = recipe.load(recipe.RECIPES / f"{name}.yaml", [f"run.steps={steps}"])
        plan = Plan.of(settings, nodes, GPUS[gpu_name], mfu, restart_minutes=0)
        n, flops = counts.parameters(settings.model), counts.flops_per_token(settings.model)
        printed, hours = paper.get(name, ("-", "-"))  # Table 1 has no 0.8B
        cells = [
            name,
            f"{n.unique:,}",
            printed,
            f"{n.applied:,}",
            f"{flops / 1e9:.2f}",
            f"{plan.needed / GIB:.1f}",
            f"{plan.days:.1f}",
            f"{plan.days * 24 * plan.ranks / 1e3:.1f}",
            hours,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines.append(
        f"At {mfu:.0%} MFU on {nodes} nodes of {GPUS[gpu_name].per_node} {gpu_name}, 1.26T tokens each, the recipes' "
        "micro-batch. Paper: Table 1. Errata: 0.52B stands there for 0.535B and for baseline2's 0.542B; sharing the "
        "FFN saves parameters and no FLOPs, so the shapes do not explain the paper's hours (docs/errata.md)."
    )
    return "\n".join(lines)
