"""Runs the suite on one model, task by task; what is finished is never repeated.

OUTPUT/MODEL--DIGEST/.lock                   held by the process that evaluates the model; lost when it ends
OUTPUT/MODEL--DIGEST/tasks/hellaswag.json    one finished task, with everything its numbers depend on
OUTPUT/MODEL--DIGEST/scores.json             the model, its scores so far, versions and shots
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
import torch.distributed as dist
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from data_tools.files.digest import new_digest, sha256_file
from data_tools.files.durable import FolderBusy, folder_lock, write_whole
from data_tools.files.errors import DataError
from data_tools.files.json_file import canonical_json, read_sealed, sealed
from megatron_patch.evaluate.data import EvaluationError, StoredImages, data_digests, loader
from megatron_patch.evaluate.language_model import CausalLM
from megatron_patch.evaluate.models import Candidate, Settings
from megatron_patch.evaluate.ranks import is_first_rank, on_first_rank
from megatron_patch.evaluate.scores import TaskResult, average, scores
from megatron_patch.evaluate.suite import BENCHMARKS, BY_NAME, IMAGE_BENCHMARKS, STOCK_FOLDERS, Benchmark, Task
from megatron_patch.results import SCORES_NAME


@dataclass(frozen=True)
class Plan:
    """What to run and with which data."""

    benchmarks: tuple[Benchmark, ...] | None
    """None: of each model those of its kind, Table 8's where it sees."""
    data: Path
    limit: int | None = None
    """Documents a task; for trials, since the scores are no longer the benchmark's."""

    def of(self, candidate: Candidate) -> tuple[Benchmark, ...]:
        """What is run on a model. Raises EvaluationError where questions about images are for one that sees none."""
        if self.benchmarks is None:
            return IMAGE_BENCHMARKS if candidate.sees else BENCHMARKS
        about_images = [b.name for b in self.benchmarks if b in IMAGE_BENCHMARKS]
        if about_images and not candidate.sees:
            raise EvaluationError(
                f"{candidate.name}: sees no images, so it cannot be asked {', '.join(about_images)}; name a checkpoint "
                "of a recipe with model.vision, or leave them out of --benchmarks"
            )
        return self.benchmarks


def result_folder(output: Path, candidate: Candidate) -> Path:
    return output / f"{candidate.name}--{candidate.digest[:12]}"


def run(candidate: Candidate, settings: Settings, plan: Plan, output: Path) -> Path | None:
    """Evaluates one model and returns its folder; None where another process is at it.

    The model is loaded only if a task is left to do. Under torchrun or srun every rank calls this; rank 0 decides and
    writes.

    Raises:
        EvaluationError: a data set is missing or damaged (before any task runs), or the model cannot be loaded.
        CheckpointError: the checkpoint is damaged.
    """
    folder = result_folder(output, candidate)
    with ExitStack() as held:
        names = on_first_rank(lambda: _claim(held, folder, candidate, settings, plan))
        if names is None:
            return None
        todo = [(b, task) for b in plan.of(candidate) for task in b.all_tasks if task.name in names]
        if todo:
            _run_tasks(todo, folder, candidate, settings, plan)
        if is_first_rank():
            _write_scores(folder, candidate, settings, plan)
        if dist.is_initialized():
            dist.barrier()
    return folder


def _claim(held: ExitStack, folder: Path, candidate: Candidate, settings: Settings, plan: Plan) -> list[str] | None:
    """Takes the model for this process, until `held` ends or the process does; names of the tasks that are left."""
    for task in (task for benchmark in plan.of(candidate) for task in benchmark.all_tasks):
        loader(plan.data, task)  # raises where the data set is missing or damaged
    try:
        held.enter_context(folder_lock(folder))
    except FolderBusy:
        return None
    return [
        task.name
        for benchmark in plan.of(candidate)
        for task in benchmark.all_tasks
        if _finished(folder, task, _key(candidate, settings, plan, benchmark, task)) is None
    ]


def _run_tasks(
    todo: list[tuple[Benchmark, Task]], folder: Path, candidate: Candidate, settings: Settings, plan: Plan
) -> None:
    # At lower levels it explains its own options for each of the 75 tasks.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if any(benchmark in IMAGE_BENCHMARKS for benchmark, _ in todo):
        settings = replace(settings, images=StoredImages(plan.data))
    model = candidate.open(settings)
    manager = task_manager()
    for number, (benchmark, task) in enumerate(todo, 1):
        started = time.perf_counter()
        report = _evaluate(model, bind(manager, benchmark, task, loader(plan.data, task)), plan.limit)
        if is_first_rank():
            record = {
                "key": _key(candidate, settings, plan, benchmark, task),
                "result": asdict(_task_result(report, task)),
                "seconds": time.perf_counter() - started,
                "version": report["versions"][task.name],
                "prompts_digest": prompts_digest(report["samples"][task.name]),
            }
            (folder / "tasks").mkdir(parents=True, exist_ok=True)
            write_whole(_task_file(folder, task), canonical_json(sealed(record)))
            print(f"{candidate.name}: {task.name} done ({number}/{len(todo)})", file=sys.stderr)


@cache
def task_manager() -> TaskManager:
    """The harness's task files of the suite and ours; reading all 13,000 of the harness takes seconds."""
    stock = Path(lm_eval.tasks.__file__).parent
    folders = [*(stock / folder for folder in STOCK_FOLDERS), Path(__file__).with_name("tasks")]
    return TaskManager(include_defaults=False, include_path=[str(folder) for folder in folders])


def bind(manager: TaskManager, benchmark: Benchmark, task: Task, load: Callable[..., Any]) -> Any:
    """The harness's task with the benchmark's shots and its data read by `load` instead of from the hub.

    Settings of a registered task can be replaced only where a group names it, so a group of one is made for it.
    """
    settings = {"task": task.name, "custom_dataset": load, "num_fewshot": benchmark.shots}
    bound = manager.load([{"group": f"{task.name}_local", "task": [settings]}])["tasks"][task.name]
    bound.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # as the harness's own command does
    return bound


def _evaluate(model: CausalLM, task: Any, limit: int | None) -> dict[str, Any]:
    """Not `simple_evaluate`, which spends two seconds a task on a survey of the machine."""
    tasks = {"tasks": {task.task_name: task}, "groups": {}, "group_map": {}}
    return evaluate(model, tasks, limit=limit, log_samples=True) or {}  # the samples are for the digest of the prompts


def _task_result(report: dict[str, Any], task: Task) -> TaskResult:
    values = {k.split(",")[0]: v for k, v in report["results"][task.name].items() if k.endswith(",none")}
    return TaskResult(
        metrics={k: float(v) for k, v in values.items() if not k.endswith("_stderr")},
        stderr={k.removesuffix("_stderr"): v for k, v in values.items() if k.endswith("_stderr") and v != "N/A"},
        documents=report["n-samples"][task.name]["effective"],
    )


def prompts_digest(samples: list[dict[str, Any]]) -> str:
    """XXH3-128 of every context and continuation, shots included: equal digests, equal questions."""
    digest = new_digest()
    for sample in samples:
        digest.update(canonical_json(sample["arguments"]))
    return str(digest.hexdigest())


def _key(candidate: Candidate, settings: Settings, plan: Plan, benchmark: Benchmark, task: Task) -> dict[str, Any]:
    """Everything a task's numbers depend on; a finished task counts only under the same key."""
    return {
        "model": candidate.digest,
        "lm_eval": lm_eval.__version__,
        "shots": benchmark.shots,
        "limit": plan.limit,
        "precision": settings.precision,
        "empty_context": settings.empty_context,
        "data": data_digests(plan.data, task),
        **({"tokenizer": sha256_file(settings.tokenizer)} if settings.tokenizer else {}),
        **({"chat_template": sha256_file(settings.chat_template)} if settings.chat_template else {}),
    }


def _task_file(folder: Path, task: Task) -> Path:
    return folder / "tasks" / f"{task.name}.json"


def _finished(folder: Path, task: Task, key: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a task that is finished under this key; None where it is to run, again if its record is damaged."""
    file = _task_file(folder, task)
    try:
        record = read_sealed(file, "the task runs again") if file.is_file() else None
    except DataError as error:
        print(error, file=sys.stderr)
        return None
    return record if record is not None and record["key"] == key else None


def _write_scores(folder: Path, candidate: Candidate, settings: Settings, plan: Plan) -> None:
    records = {}
    for benchmark in BY_NAME.values():
        for task in benchmark.all_tasks:
            record = _finished(folder, task, _key(candidate, settings, plan, benchmark, task))
            if record is not None:
                records[task.name] = record
    found = scores({name: TaskResult(**record["result"]) for name, record in records.items()})
    averages = {
        "average": average(found, with_crows_pairs=True),
        "average_without_crows_pairs": average(found, with_crows_pairs=False),
    }
    content = {
        "model": candidate.name,
        "digest": candidate.digest,
        "step": candidate.step,
        "tokens": candidate.tokens,
        "settings": {"precision": settings.precision, "empty_context": settings.empty_context, "limit": plan.limit},
        "lm_eval": lm_eval.__version__,
        "scores": {name: asdict(score) for name, score in found.items()},
        **{name: asdict(score) if score else None for name, score in averages.items()},
        "tasks": {
            name: {
                "shots": r["key"]["shots"],
                "documents": r["result"]["documents"],
                "version": r["version"],
                "prompts_digest": r["prompts_digest"],
            }
            for name, r in records.items()
        },
    }
    file = folder / SCORES_NAME
    if not file.is_file() or file.read_bytes() != canonical_json(content):
        write_whole(file, canonical_json(content))
