"""What more nodes bring: `plan RECIPE --scale 1,2,4,8,20,40` prints a table and draws the curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_tools.files.durable import write_beside
from megatron_patch.plan.hardware import Hardware
from megatron_patch.plan.plan import Plan
from megatron_patch.recipe import Recipe


def plans(settings: Recipe, hardware: Hardware, nodes: Sequence[int]) -> list[Plan]:
    """The recipe on each number of nodes, its global batch as it is; the micro-batch of the recipe or the smaller one
    with which a step is shortest, where ranks share the rows out badly.

    Raises ValueError where the layout does not divide the ranks.
    """
    return [_fastest(settings, hardware.on(n)) for n in nodes]


def _fastest(settings: Recipe, hardware: Hardware) -> Plan:
    sizes = range(settings.batch.micro_batch_size, 0, -1)
    found = (Plan.of(_with_micro_batch(settings, size), hardware) for size in sizes)
    return min(found, key=lambda plan: plan.step.seconds)


def _with_micro_batch(settings: Recipe, size: int) -> Recipe:
    return settings.model_copy(update={"batch": settings.batch.model_copy(update={"micro_batch_size": size})})


def efficiency(plan: Plan, first: Plan) -> float:
    """Tokens/s a GPU, as a share of those on the first number of nodes."""
    return plan.tokens_per_second / plan.ranks / (first.tokens_per_second / first.ranks)


def table(found: Sequence[Plan]) -> str:
    lines = [
        "| nodes | GPUs | micro-batches | padding | step, s | waited for | tokens/s | a GPU | efficiency | days "
        "| K GPU hours | bound by |",
        f"|{'---:|' * 11}---|",
    ]
    for plan in found:
        cells = [
            f"{plan.hardware.nodes}",
            f"{plan.ranks}",
            f"{plan.places[0].micro_batches} x {plan.settings.batch.micro_batch_size}",
            f"{1 - plan.unpadded_share:.1%}",
            f"{plan.step.seconds:.3f}",
            f"{plan.step.waited / plan.step.seconds:.1%}",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.tokens_per_second / plan.ranks:,.0f}",
            f"{efficiency(plan, found[0]):.1%}",
            f"{plan.days:.1f}",
            f"{plan.gpu_hours / 1e3:.1f}",
            plan.step.bound_by,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    batch = found[0].settings.batch.global_batch_size
    lines += ["", f"{found[0].settings.name}, {batch} rows a step on any number of nodes; efficiency is that of a GPU."]
    return "\n".join(lines)


def draw(found: Sequence[Plan], image: Path) -> None:
    """Tokens/s against GPUs, beside the straight line through the first number of nodes; the ending of `image` names
    its format (ValueError: none such)."""
    from matplotlib.figure import Figure  # seconds, which no plan without a picture waits for

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    ranks = [plan.ranks for plan in found]
    axes.plot(ranks, [plan.tokens_per_second / 1e6 for plan in found], "o-", label=found[0].settings.name)
    each = found[0].tokens_per_second / found[0].ranks / 1e6
    axes.plot(ranks, [each * n for n in ranks], "--", color="tab:gray", label=f"{found[0].hardware.nodes} node's pace")
    for plan in found[1:]:
        axes.annotate(
            f"{efficiency(plan, found[0]):.0%}",
            (plan.ranks, plan.tokens_per_second / 1e6),
            textcoords="offset points",
            xytext=(4, -12),
            fontsize=8,
        )
    axes.set(xlabel="GPUs", ylabel="million tokens/s", xlim=(0, None), ylim=(0, None))
    axes.set_title(f"{found[0].settings.name} on nodes of {found[0].gpu.per_node} {found[0].hardware.name}, planned")
    for text in (axes.title, *axes.legend().get_texts()):
        text.set_parse_math(False)  # a recipe's name is no formula
    with write_beside(image) as stream:
        figure.savefig(stream, format=image.suffix.removeprefix(".") or "png", dpi=120)
