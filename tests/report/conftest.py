from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from megatron_patch import recipe
from megatron_patch.evaluate.suite import BENCHMARKS
from megatron_patch.run import attempts
from tests.toy import TOY
from tests.train.job import Job, write_data_set


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of 60 steps at toy size that was killed half-way and started again, as Slurm's launcher does."""
    folder = tmp_path_factory.mktemp("report") / "run"
    data = write_data_set(folder.parent / "data")
    settings = [
        f"data.folder={data}", f"run.folder={folder}", "run.steps=60", "batch.micro_batch_size=8",
        "checkpoint.interval_minutes=0", "checkpoint.interval_steps=12", "checkpoint.milestone_steps=20",
        "data.held_out_interval=20",
    ]  # fmt: skip
    resolved = recipe.load("recipes/demo.yaml", [*TOY, "data.held_out_rows=8", *settings])
    log = folder / "log.jsonl"
    attempts.begin(folder, resolved, "1", 3, [], patience=0)
    job = Job(1, settings, folder.with_suffix(".log"))
    job.wait_for(lambda: log.exists() and log.read_text().count('"loss"') > 30)
    job.kill()
    attempts.begin(folder, resolved, "1", 3, [], patience=0)
    Job(1, settings, folder.with_suffix(".log")).run()
    return folder


@pytest.fixture(scope="session")
def evaluations(run: Path) -> Path:
    """Results of `eval` for each milestone of the run."""
    folder = run.parent / "evaluations"
    with (run / "checkpoints" / "checkpoints.csv").open(newline="") as stream:
        milestones = list(csv.DictReader(stream))
    for i, m in enumerate(milestones):
        scores = {b.name: {"value": 30.0 + i, "stderr": 0.5, "stock": None} for b in BENCHMARKS}
        content = {
            "model": f"demo--{m['name']}", "digest": m["digest"], "step": int(m["step"]), "tokens": int(m["tokens"]),
            "settings": {"limit": None}, "lm_eval": "0.4.13", "scores": scores, "tasks": {},
            "average": {"value": 30.0 + i, "stderr": 0.2, "stock": None},
        }  # fmt: skip
        (folder / m["name"]).mkdir(parents=True)
        (folder / m["name"] / "scores.json").write_text(json.dumps(content))
    return folder
