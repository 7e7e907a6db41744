"""Table 1 and Figure 1 of the paper with models of one's own: parameters, tokens, GPU hours, memory, accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_patch import counts
from megatron_patch.evaluate.paper import TABLE_1, TABLE_4, TABLE_9
from megatron_patch.evaluate.results import read_scores
from megatron_patch.recipe import Recipe, load
from megatron_patch.report.read import read_run

Row = tuple[str, str, str, float | None, float | None, float | None, float | None, float | None]

_HEAD = ("Model", "Source", "Parameters", "Tokens (B)", "GPU hours", "Memory (GB)", "GFLOP a token", "Accuracy")
_PAPER_TOKENS = 1259.13  # billions, Table 2
_PAPER_ACCURACY = {
    "MobiLlama": next(r.average for r in TABLE_4 if r.model == "MobiLlama 0.5B"),
    "large-base": TABLE_9[0].average,
}


_NOTES = (
    "- Accuracy is the mean of the nine benchmarks (`eval`), CrowS-Pairs included.",
    "- GPU hours of a run span its first to its last step, pauses included.",
    "- The paper does not say what its memory counts; a run's is the most ever allocated on rank 0.",
    "- GFLOP a token count each use of a shared FFN, so MobiLlama and large-base cost the same.",
)


def compare(paths: Sequence[Path], evaluations: Path) -> str:
    """Markdown: the paper's rows, then a row for each run folder (trained) or recipe file (planned).

    Raises:
        ReportError, RecipeError: neither a run nor a valid recipe.
    """
    rows: list[Row] = [
        (r.model, "paper, A100", r.parameters, _PAPER_TOKENS if r.model in _PAPER_ACCURACY else None, r.gpu_hours,
         r.memory_gb, None, _PAPER_ACCURACY.get(r.model))
        for r in TABLE_1
    ]  # fmt: skip
    rows += [_planned(load(p)) if p.is_file() else _trained(p, evaluations) for p in paths]
    lines = [f"| {' | '.join(_HEAD)} |", "|---|---|" + "---:|" * (len(_HEAD) - 2)]
    lines += [f"| {' | '.join(_cell(c) for c in row)} |" for row in rows]
    return "\n".join([*lines, "", *_NOTES])


def _planned(recipe: Recipe) -> Row:
    tokens = None
    if recipe.run.steps:
        tokens = recipe.run.steps * recipe.batch.global_batch_size * recipe.model.sequence_length / 1e9
    return _row(recipe, "planned", tokens, None, None, None)


def _trained(folder: Path, evaluations: Path) -> Row:
    run = read_run(folder, evaluations)
    hours = memory = tokens = None
    if run.steps:
        first, last = run.steps[0], run.steps[-1]
        seconds = last["time"] - first["time"] + first["seconds"]
        hours = seconds / 3600 * run.status["ranks"] if "ranks" in run.status else None
        memory = max((s["memory"] / 1e9 for s in run.steps if s.get("memory") is not None), default=None)
        tokens = last["tokens"] / 1e9
    scores = [s for s in read_scores(evaluations) if s["digest"] in {m["digest"] for m in run.milestones}]
    average = scores[-1]["average"] if scores else None
    source = str(run.status.get("state", "not started"))
    return _row(run.recipe, source, tokens, hours, memory, average["value"] if average else None)


def _row(
    recipe: Recipe,
    source: str,
    tokens: float | None,
    hours: float | None,
    memory: float | None,
    accuracy: float | None,
) -> Row:
    unique = counts.parameters(recipe.model).unique
    return (
        recipe.name, source, f"{unique:,}", tokens, hours, memory, counts.flops_per_token(recipe.model) / 1e9, accuracy
    )  # fmt: skip


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:,.2f}"
