"""The paper's Table 1: its models side by side, planned, in Markdown."""

from __future__ import annotations

from data_tools.dataset.format import NUM_SEGMENTS
from megatron_patch import recipe
from megatron_patch.model import counts
from megatron_patch.paper import TABLE_1
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
