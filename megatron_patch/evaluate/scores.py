"""From the harness's results of single tasks to the paper's scores, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_patch.evaluate.suite import BENCHMARKS, BY_NAME, CROWS_PAIRS, Benchmark, Task


@dataclass(frozen=True)
class TaskResult:
    """What the harness reported of one task.

    Attributes:
        metrics: metric -> value in [0, 1]; of MME points.
        stderr: metric -> standard error of the mean over documents; not of a single document.
        documents: how many were scored.
    """

    metrics: dict[str, float]
    stderr: dict[str, float]
    documents: int


@dataclass(frozen=True)
class Score:
    """In percent, or in a benchmark's own points.

    Attributes:
        stderr: standard error; None where a task has a single document.
        stock: the harness's own score, where it differs from the paper's way of scoring.
    """

    value: float
    stderr: float | None
    stock: float | None = None


def score(benchmark: Benchmark, results: Mapping[str, TaskResult]) -> Score:
    """The unweighted mean over the benchmark's tasks, as the authors took it (Analysis360, get_score)."""
    found = [results[task.name] for task in benchmark.tasks]
    n = len(found)
    return Score(
        value=benchmark.unit * sum(r.metrics[benchmark.metric] for r in found) / n,
        stderr=_of_mean([_stderr(benchmark, r) for r in found]),
        stock=_stock(benchmark, results),
    )


def scores(results: Mapping[str, TaskResult]) -> dict[str, Score]:
    """Every benchmark whose tasks are all there, by name, in the paper's order."""
    return {b.name: score(b, results) for b in BY_NAME.values() if all(task.name in results for task in b.all_tasks)}


def average(found: Mapping[str, Score], *, with_crows_pairs: bool) -> Score | None:
    """Mean over the nine (or, without CrowS-Pairs, eight) benchmarks; None where one is missing."""
    wanted = [b.name for b in BENCHMARKS if with_crows_pairs or b.name != CROWS_PAIRS]
    if any(name not in found for name in wanted):
        return None
    value = sum(found[name].value for name in wanted) / len(wanted)
    return Score(value, _of_mean([found[name].stderr for name in wanted]))


def _stderr(benchmark: Benchmark, result: TaskResult) -> float | None:
    found = result.stderr.get(benchmark.metric)
    return None if found is None else benchmark.unit * found


def _of_mean(errors: list[float | None]) -> float | None:
    """Standard error of a mean of independent values from theirs."""
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known)) / len(errors) if len(known) == len(errors) else None


def _stock(benchmark: Benchmark, results: Mapping[str, TaskResult]) -> float | None:
    if benchmark.stock is None:
        return None
    tasks: tuple[Task, ...] = benchmark.stock.tasks
    documents = sum(results[task.name].documents for task in tasks)
    weighted = sum(results[task.name].metrics[benchmark.stock.metric] * results[task.name].documents for task in tasks)
    return benchmark.unit * weighted / documents
