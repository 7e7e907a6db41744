"""Everything a run left behind, finished or not: log, status, recipe, attempts, milestones, data mix, scores."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.dataset.format import MANIFEST_NAME, DatasetManifest
from megatron_patch import launch
from megatron_patch.recipe import Recipe, load
from megatron_patch.report.series import Thinned
from megatron_patch.results import read_scores
from megatron_patch.run import milestones
from megatron_patch.run.attempts import attempts, read_status
from megatron_patch.run.log import is_number, is_step, records

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


CURVES = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "memory")
"""Numbers of a step that are drawn; the last two are null, or not there, without a GPU."""


@dataclass
class Steps:
    """What a report says of the steps of a log, however many they are. False before the first."""

    first: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    count: int = 0
    lately: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=50))
    curves: dict[str, Thinned] = field(default_factory=lambda: {name: Thinned() for name in CURVES})

    def __bool__(self) -> bool:
        return self.count > 0

    def add(self, record: dict[str, Any]) -> None:
        self.first = self.first or record
        self.last = record
        self.count += 1
        self.lately.append(record)
        time, tokens = record["time"], record["tokens"]
        for name, curve in self.curves.items():
            value = record.get(name)
            if type(value) is float or is_number(value):
                curve.add(time, tokens, value)


@dataclass
class Run:
    """A run folder as read. `held_out` are losses, the newest beside them (None: not finite); `mix` rows by source."""

    folder: Path
    recipe: Recipe
    status: dict[str, Any]
    steps: Steps = field(default_factory=Steps)
    held_out: Thinned = field(default_factory=Thinned)
    last_held_out: float | None = None
    restarts: list[Restart] = field(default_factory=list)
    milestones: list[dict[str, str]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    mix: dict[str, int] | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    def tokens_of(self, step: int) -> int:
        return step * self.recipe.batch.global_batch_size * self.recipe.model.sequence_length


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
    started = attempts(folder)
    restarts = Restarts([a["started"] for a in started])
    for record in records(folder / "log.jsonl"):
        if "time" not in record:
            continue
        if is_step(record):
            run.steps.add(record)
        elif "held_out_loss" in record:
            run.last_held_out = record["held_out_loss"]
            if run.last_held_out is not None:
                run.held_out.add(record["time"], run.tokens_of(record["step"]), run.last_held_out)
        restarts.add(record)
    run.restarts = restarts.found
    run.milestones, _ = milestones.read(folder / "checkpoints" / milestones.TABLE_NAME)
    digests = {m["digest"] for m in run.milestones}
    run.scores = [s for s in read_scores(evaluations) if s["digest"] in digests]
    run.mix = _mix(run.recipe)
    run.environment = started[-1] if started else _checkpoint_environment(folder)
    return run


class Restarts:
    """Starts of the ranks after the first, each with the steps around it, from records in the order of the log.

    `recorded` are the starts that Slurm's launcher knows of. Others, by hand, are gaps of the log that hold none of
    them: a step's time begins where the record before it ends, but for a save, and a first step where the ranks are
    ready.
    """

    def __init__(self, recorded: Sequence[float]) -> None:
        self.found: list[Restart] = []
        self._recorded = sorted(recorded)
        self._told = 0  # of the recorded ones, those before the newest step
        self._first = True  # the next start is the run's first
        self._before: float | None = None  # time of the record before
        self._step_before: float | None = None

    def add(self, record: dict[str, Any]) -> None:
        """A record with its `time`; those with `seconds` are steps."""
        if "seconds" in record:
            begun = record["time"] - record["seconds"]
            upto = bisect_right(self._recorded, record["time"], lo=self._told)
            starts = self._recorded[self._told : upto]
            self._told = upto
            if self._is_unrecorded(begun):
                starts = sorted([*starts, begun])
            if self._first and starts:
                starts, self._first = starts[1:], False
            if starts and (not self.found or self.found[-1].step != record["step"] - 1):
                lost = begun - (starts[0] if self._step_before is None else self._step_before)
                self.found.append(Restart(begun, record["step"] - 1, max(lost, 0.0)))
            self._step_before = record["time"]
        self._before = record["time"]

    def _is_unrecorded(self, begun: float) -> bool:
        if self._step_before is None:
            return bisect_right(self._recorded, begun) == 0
        assert self._before is not None
        if begun - self._before <= _LONGEST_SAVE:
            return False
        return bisect_right(self._recorded, self._before) == bisect_right(self._recorded, begun)


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
