"""The paper's Table 1: its models side by side, planned, in Markdown."""

from __future__ import annotations

from pathlib import Path

from data_tools.dataset.format import NUM_SEGMENTS
from data_tools.files.durable import write_beside
from megatron_patch import recipe
from megatron_patch.model import counts
from megatron_patch.paper import TABLE_1, CostRow
from megatron_patch.parallel.gpus import GIB
from megatron_patch.plan.hardware import Hardware
from megatron_patch.plan.plan import ROWS_PER_SEGMENT, Plan

MODELS = ("mobillama_05b", "mobillama_08b", "large_base", "baseline1", "baseline2")


def plans(hardware: Hardware) -> list[Plan]:
    """The paper's models, all over the same 1.26T tokens, as Table 1 has it."""
    found = []
    for name in MODELS:
        file = recipe.RECIPES / f"{name}.yaml"
        steps = ROWS_PER_SEGMENT // recipe.load(file).batch.global_batch_size * NUM_SEGMENTS
        found.append(Plan.of(recipe.load(file, [f"run.steps={steps}"]), hardware))
    return found


def table(hardware: Hardware) -> str:
    """The models side by side, Table 1 beside the exact numbers."""
    paper = {row.recipe: row for row in TABLE_1}
    lines = [
        "| model | parameters | paper | applied | GFLOP/token | GiB a GPU | paper, GB | tokens/s a GPU | days | paper "
        "| K GPU hours | paper |",
        f"|---|{'---:|' * 11}",
    ]
    for plan in plans(hardware):
        model = plan.settings.model
        n, row = counts.parameters(model), paper.get(plan.settings.name)  # Table 1 has no 0.8B
        cells = [
            plan.settings.name,
            f"{n.unique:,}",
            row.parameters if row else "-",
            f"{n.applied:,}",
            f"{counts.flops_per_token(model) / 1e9:.2f}",
            f"{plan.needed / GIB:.1f}",
            f"{row.memory_gb:.1f}" if row else "-",
            f"{plan.tokens_per_second / plan.ranks:,.0f}",
            f"{plan.days:.1f}",
            f"{row.days:.1f}" if row else "-",
            f"{plan.gpu_hours / 1e3:.1f}",
            f"{row.gpu_hours / 1e3:.1f}" if row else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Planned on {hardware}, 1.26T tokens each, the recipes' micro-batch. Paper: Table 1. Errata: 0.52B stands "
        "there for 0.535B and for baseline2's 0.542B; sharing the FFN saves parameters and no FLOPs, so the shapes do "
        "not explain the paper's hours; what its memory counts it does not say (docs/errata.md).",
    ]
    return "\n".join(lines)


def draw(hardware: Hardware, image: Path) -> None:
    """Table 1 as bars, planned beside the paper's; the ending of `image` names its format (ValueError: none such)."""
    found, paper = plans(hardware), {row.recipe: row for row in TABLE_1}
    ours = [
        (counts.parameters(p.settings.model).unique / 1e9, p.gpu_hours / 1e3, p.needed / 1e9, p.days) for p in found
    ]
    theirs = [_numbers(paper.get(plan.settings.name)) for plan in found]
    titles = ("Parameters (B)", "GPU hours (K)", "Memory a GPU (GB)", "Days")
    from matplotlib.figure import Figure  # seconds, which no plan without a picture waits for

    figure = Figure(figsize=(13, 3.6), layout="constrained")
    for panel, (axes, title) in enumerate(zip(figure.subplots(1, len(titles), sharey=True), titles, strict=True)):
        for rows, offset, colour, name in ((ours, -0.2, "tab:blue", "planned"), (theirs, 0.2, "tab:gray", "paper")):
            values = [row[panel] for row in rows]
            bars = axes.barh([i + offset for i in range(len(rows))], values, height=0.38, color=colour, label=name)
            axes.bar_label(bars, [f"{value:.3g}" if value else "-" for value in values], fontsize=8, padding=2)
        axes.set_yticks(range(len(found)), [plan.settings.name for plan in found])
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.25)
        axes.set_xticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    figure.suptitle(f"Table 1, planned on {hardware}, 1.26T tokens each", fontsize=11)
    with write_beside(image) as stream:
        figure.savefig(stream, format=image.suffix.removeprefix(".") or "png", dpi=120)


def _numbers(row: CostRow | None) -> tuple[float, float, float, float]:
    """The paper's, in the order of the panels; 0 for what it does not have."""
    if row is None:
        return 0.0, 0.0, 0.0, 0.0
    return float(row.parameters.removesuffix("B")), row.gpu_hours / 1e3, row.memory_gb, row.days
