"""Table 1 and Figure 1 of the paper with models of one's own, trained or planned, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from data_tools.files.bounded_json import is_number
from data_tools.files.durable import write_beside
from megatron_patch.model import counts
from megatron_patch.paper import TABLE_1, TABLE_4, TABLE_9
from megatron_patch.plan.hardware import Hardware
from megatron_patch.plan.plan import Plan
from megatron_patch.recipe import Recipe, find, load
from megatron_patch.report.bars import Panel, bars, height
from megatron_patch.report.on_device import DeviceRow, device_panels
from megatron_patch.report.read import ReportError, read_run

_PAPER_TOKENS = 1259.13  # billions, the total of Table 2
_PAPER_ACCURACY = {
    "MobiLlama": next(r.average for r in TABLE_4 if r.model == "MobiLlama 0.5B"),
    "large-base": TABLE_9[0].average,
}


@dataclass(frozen=True)
class Row:
    """A model. `parameters`, unique ones, and `tokens` in billions; `memory` in GB a GPU; None where not known."""

    model: str
    source: str
    parameters: str
    tokens: float | None
    gpu_hours: float | None
    memory: float | None
    gflop: float | None
    accuracy: float | None
    budget: str | None = None
    """Of a planned model: what its tokens are."""


_COLUMNS = (
    ("Model", "model"), ("Source", "source"), ("Parameters", "parameters"), ("Tokens (B)", "tokens"),
    ("GPU hours", "gpu_hours"), ("Memory (GB)", "memory"), ("GFLOP a token", "gflop"), ("Accuracy", "accuracy"),
)  # fmt: skip


def rows(paths: Sequence[Path], evaluations: Path, hardware: Hardware) -> list[Row]:
    """The paper's rows, then one for each run folder (trained) or recipe file (planned).

    Raises:
        ReportError, RecipeError, ValueError: neither a run nor a valid recipe, or a plan that does not divide.
    """
    paper = [
        Row(r.model, "paper, A100", r.parameters, _PAPER_TOKENS if r.model in _PAPER_ACCURACY else None, r.gpu_hours,
            r.memory_gb, None, _PAPER_ACCURACY.get(r.model))
        for r in TABLE_1
    ]  # fmt: skip
    return paper + [_row(path, evaluations, hardware) for path in paths]


def markdown(found: Sequence[Row], hardware: Hardware) -> str:
    lines = [f"| {' | '.join(title for title, _ in _COLUMNS)} |", "|---|---|" + "---:|" * (len(_COLUMNS) - 2)]
    lines += [f"| {' | '.join(_cell(getattr(row, name)) for _, name in _COLUMNS)} |" for row in found]
    notes = (
        "- Accuracy is the mean of the nine benchmarks (`eval`), CrowS-Pairs included.",
        "- GPU hours of a run span its first to its last step, pauses included.",
        f"- GPU hours and memory of a planned model are those of `plan` on {hardware}.",
        "- The paper does not say what its memory counts; a run's is the most ever allocated on rank 0.",
        "- GFLOP a token count each use of a shared FFN, so MobiLlama and large-base cost the same.",
    )
    budgets = [f"- {row.model} is planned for {row.budget}." for row in found if row.budget]
    return "\n".join([*lines, "", *budgets, *notes])


def draw(found: Sequence[Row], devices: Sequence[DeviceRow], image: Path) -> None:
    """Figure 1: a panel of bars for each quantity, below them those of `devices` where there are any.

    The ending of `image` names its format (ValueError: none such).
    """
    columns = _COLUMNS[2:]
    heights = [height(len(rows)) for rows in (found, devices) if rows]
    figure = Figure(figsize=(3.2 * len(columns), sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    titles = {"parameters": "Parameters (B)"}
    panels: list[Panel] = [
        (titles.get(name, title), [_number(getattr(row, name)) for row in found]) for title, name in columns
    ]
    names = [f"{row.model} ({row.source.split(',')[0]})" for row in found]
    bars(parts[0], names, [row.source.startswith("paper") for row in found], panels)
    if devices:
        names, panels = device_panels(devices)
        bars(parts[1], names, [row.is_paper for row in devices], panels)
    with write_beside(image) as stream:
        figure.savefig(stream, format=image.suffix.removeprefix(".") or "png", dpi=120)


def _row(path: Path, evaluations: Path, hardware: Hardware) -> Row:
    if not path.is_dir():
        if (file := find(path)).is_file():
            return _planned(load(file), hardware)
        raise ReportError(f"{path}: no such run folder or recipe file; e.g. runs/mobillama_05b, recipes/baseline1.yaml")
    return _trained(path, evaluations)


def _planned(recipe: Recipe, hardware: Hardware) -> Row:
    plan = Plan.of(recipe, hardware)
    tokens = plan.steps * plan.tokens_per_step
    whole = f"every whole batch of the data, once: {plan.steps:,} steps"
    given = f"the {plan.steps:,} steps that its recipe says (run.steps)"
    row = _model(recipe, "planned", tokens, plan.gpu_hours, plan.needed, None)
    return replace(row, budget=whole if recipe.run.steps is None else given)


def _trained(folder: Path, evaluations: Path) -> Row:
    run = read_run(folder, evaluations)
    hours = memory = tokens = None
    if run.steps:
        first, last = run.steps.first, run.steps.last
        seconds = last["time"] - first["time"] + first["seconds"]
        hours = seconds / 3600 * run.status["ranks"] if is_number(run.status.get("ranks")) else None
        memory = max((value for _, _, value in run.steps.curves["memory"].points()), default=None)
        tokens = last["tokens"]
    average = next((s["average"]["value"] for s in reversed(run.scores) if s["average"]), None)
    return _model(run.recipe, str(run.status.get("state", "not started")), tokens, hours, memory, average)


def _model(
    recipe: Recipe, source: str, tokens: int | None, hours: float | None, memory: float | None, accuracy: float | None
) -> Row:
    return Row(
        recipe.name,
        source,
        f"{counts.parameters(recipe.model).unique:,}",
        None if tokens is None else tokens / 1e9,
        hours,
        None if memory is None else memory / 1e9,
        counts.flops_per_token(recipe.model) / 1e9,
        accuracy,
    )


def _number(value: str | float | None) -> float | None:
    """Parameters stand as text: 0.52B in the paper, every digit of ours."""
    if not isinstance(value, str):
        return value
    return float(value.removesuffix("B")) if value.endswith("B") else int(value.replace(",", "")) / 1e9


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:,.4g}" if 0 < value < 0.1 else f"{value:,.2f}"
