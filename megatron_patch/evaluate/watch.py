"""Evaluates a run's milestones as they appear, beside the training job: `eval RUN --watch`.

Any number of processes may watch one run into one folder of results: each takes the oldest milestone that has no scores
and that no other is at. A process that is killed loses the task it was at, and another takes the milestone over.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_patch.evaluate.data import EvaluationError
from megatron_patch.evaluate.models import Settings, checkpoint, checkpoints_in
from megatron_patch.evaluate.plot import plot
from megatron_patch.evaluate.ranks import is_first_rank, on_first_rank
from megatron_patch.evaluate.run import Plan, run
from megatron_patch.results import SCORES_NAME
from megatron_patch.run.attempts import STOP_NAME, read_status
from megatron_patch.train.checkpoint.format import MARKER_NAME, CheckpointError

PLOT_NAME = "scores.png"


@dataclass(frozen=True)
class Patience:
    """Seconds between two looks at the run, and seconds of silence after which a run is taken for given up."""

    every: float
    silence: float


Milestone = tuple[Path, int]
"""A checkpoint and when it was finished: a run that went back writes a milestone of the same name again."""


def watch(folder: Path, settings: Settings, plan: Plan, output: Path, patience: Patience) -> tuple[list[Path], bool]:
    """Returns, when the run is over and every milestone has its scores, their folders and whether all went well.

    The run is over when it is complete, when it has been stopped by its STOP file, or when it has been silent for too
    long. A damaged milestone is named and left out. Redraws OUTPUT/scores.png after each milestone.

    Raises:
        EvaluationError: `folder` is not a run, or a data set is missing or damaged.
    """
    if not on_first_rank(lambda: bool(read_status(folder))):
        raise EvaluationError(f"{folder}: no status.json in it; --watch takes the folder of a run that has begun")
    results: dict[Milestone, Path] = {}
    broken: set[Milestone] = set()
    told = -1
    while True:
        # Before the look at the milestones, or the last one could be missed.
        over = on_first_rank(lambda: _over(folder, patience.silence))
        left = [m for m in on_first_rank(lambda: _milestones(folder)) if m not in results and m not in broken]
        num_busy = 0
        for milestone in left:
            try:
                result = run(checkpoint(milestone[0]), settings, plan, output)
            except CheckpointError as error:
                broken.add(milestone)
                _say(f"left out: {error}")
                continue
            if result is None:
                num_busy += 1
            else:
                results[milestone] = result
                _redraw(result, output / PLOT_NAME)
        if len(left) > num_busy:
            continue  # that took its time: look again at once
        if over and not left:
            _say(f"{folder}: {over}; {len(results)} milestones have their scores")
            return list(results.values()), not broken
        if told != len(results):
            _say(f"{folder}: {len(results)} milestones have their scores; waiting for the next")
            told = len(results)
        time.sleep(patience.every)


def _over(folder: Path, silence: float) -> str:
    """Why no further milestone will come; empty while one may."""
    status = read_status(folder)
    state = status.get("state")
    if state == "completed":
        return "the run is complete"
    if (folder / STOP_NAME).exists() and state not in ("starting", "running"):
        return f"the run was stopped ({STOP_NAME})"
    if (silent := time.time() - status.get("updated", 0.0)) > silence:
        return f"the run has been silent for {silent / 3600:.1f} h (--patience); watch it again when it goes on"
    return ""


def _milestones(folder: Path) -> list[Milestone]:
    if not (folder / "checkpoints").is_dir():
        return []
    return [(path, (path / MARKER_NAME).stat().st_mtime_ns) for path in checkpoints_in(folder)]


def _redraw(result: Path, png: Path) -> None:
    """Unless the plot is newer than the result: a sweep that is started again finds most of them done."""
    if is_first_rank() and not (png.is_file() and png.stat().st_mtime > (result / SCORES_NAME).stat().st_mtime):
        plot(png.parent, png)


def _say(text: str) -> None:
    if is_first_rank():
        print(text, file=sys.stderr, flush=True)
