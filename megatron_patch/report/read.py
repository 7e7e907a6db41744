"""Everything a run left behind, finished or not: log, status, recipe, attempts, milestones, data mix, scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.dataset.format import MANIFEST_NAME, DatasetManifest
from megatron_patch import launch
from megatron_patch.recipe import Recipe, load
from megatron_patch.results import read_scores
from megatron_patch.run import milestones
from megatron_patch.run.attempts import attempts, read_status
from megatron_patch.run.log import is_step, records

_LONGEST_SAVE = 10.0
"""Seconds that a save may hold up the loop; ranks that start again need longer on any cluster."""


class ReportError(ValueError):
    """A folder that is no run: names it and what to do."""


@dataclass(frozen=True)
class Restart:
    """A start of the ranks after the first.

    Attributes:
        time: when its first step began, seconds since 1970.
        step: the step it went on from.
        lost: seconds from the last kept step to then: steps made again, the queue, the start-up.
    """

    time: float
    step: int
    lost: float


@dataclass
class Run:
    """A run folder as read. `steps` and `held_out` are records of log.jsonl; `mix` is rows by source."""

    folder: Path
    recipe: Recipe
    status: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[dict[str, Any]] = field(default_factory=list)
    restarts: list[Restart] = field(default_factory=list)
    milestones: list[dict[str, str]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    mix: dict[str, int] | None = None
    environment: dict[str, Any] = field(default_factory=dict)


def read_run(folder: Path, evaluations: Path) -> Run:
    """Reads a run folder; whatever is not there yet is empty.

    Raises:
        ReportError: no recipe.yaml in it.
        RecipeError: the recipe is not valid.
        DataError: the data set's manifest is damaged.
    """
    if not (folder / "recipe.yaml").is_file():
        raise ReportError(f"{folder}: no recipe.yaml in it; name a run's folder, e.g. runs/mobillama_05b")
    run = Run(folder, load(folder / "recipe.yaml"), read_status(folder))
    logged = [record for record in records(folder / "log.jsonl") if "time" in record]
    for record in logged:
        if is_step(record):
            run.steps.append(record)
        elif "held_out_loss" in record:
            run.held_out.append(record)
        elif "watchdog" in record:
            run.remarks.append(record)
    started = attempts(folder)
    starts = [a["started"] for a in started]
    run.restarts = restarts(run.steps, [*starts, *unrecorded_starts(logged, starts)])
    run.milestones, _ = milestones.read(folder / "checkpoints" / milestones.TABLE_NAME)
    digests = {m["digest"] for m in run.milestones}
    run.scores = [s for s in read_scores(evaluations) if s["digest"] in digests]
    run.mix = _mix(run.recipe)
    run.environment = started[-1] if started else _checkpoint_environment(folder)
    return run


def restarts(steps: Sequence[dict[str, Any]], starts: Sequence[float]) -> list[Restart]:
    """Pairs each start of the ranks after the first with the steps around it."""
    found: list[Restart] = []
    for start in sorted(starts)[1:]:
        after = next((i for i, s in enumerate(steps) if s["time"] >= start), None)
        if after is None:
            continue
        step, before = steps[after], steps[after - 1] if after else None
        begun = step["time"] - step["seconds"]
        if not found or found[-1].step != step["step"] - 1:
            found.append(Restart(begun, step["step"] - 1, max(begun - (before["time"] if before else start), 0.0)))
    return found


def unrecorded_starts(logged: Sequence[dict[str, Any]], starts: Sequence[float]) -> list[float]:
    """Starts by hand, of which only Slurm's launcher keeps records: gaps of the log that hold none of `starts`.

    A step's time begins where the record before it ends, but for a save, and a first step where the ranks are ready.
    """
    found = []
    steps = [(i, r["time"] - r["seconds"]) for i, r in enumerate(logged) if "seconds" in r]
    if steps and not any(start <= steps[0][1] for start in starts):
        found.append(steps[0][1])
    for i, begun in steps:
        before = logged[i - 1]["time"] if i else begun
        if begun - before > _LONGEST_SAVE and not any(before < start <= begun for start in starts):
            found.append(begun)
    return found


def _mix(recipe: Recipe) -> dict[str, int] | None:
    """Rows by source of the data set, or None where it is not within reach."""
    if recipe.data.folder is None or not (recipe.data.folder / MANIFEST_NAME).is_file():
        return None
    return dict(DatasetManifest.read(recipe.data.folder / MANIFEST_NAME).rows_per_source)


def _checkpoint_environment(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint says it was written with, whose index is whole."""
    indexes = sorted((folder / "checkpoints").glob("*/index.json"), key=lambda f: f.stat().st_mtime)
    written = (launch.read_json(index).get("environment") for index in reversed(indexes))
    return next((environment for environment in written if isinstance(environment, dict)), {})
