"""The sweep beside a training job: every milestone of a real run, as it appears, by two array tasks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from site_folder import REPOSITORY, Site
from slurm_cluster import Cluster, wait_for

BENCHMARKS = "piqa,winogrande"
TASKS = ("piqa", "winogrande")
PREPARE = """
import sys
from pathlib import Path
from tests.convert.samples import train_tokenizer
from tests.evaluate.small_data import write_all
write_all(Path(sys.argv[1]) / "benchmarks")
train_tokenizer(Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def evaluation_data(scratch: Path) -> Path:
    """Small data sets of every benchmark, and a tokenizer."""
    folder = scratch / "evaluation"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", PREPARE, folder], cwd=REPOSITORY, check=True)
    return folder


def test_the_sweep_follows_a_training_job(cluster: Cluster, scratch: Path, data: Path, evaluation_data: Path) -> None:
    edits = {
        "SITE_DATA=$SITE_REPOSITORY/data/amber ": f"SITE_DATA={data} ",
        "SITE_PREFLIGHT=yes": "SITE_PREFLIGHT=no",
        "SITE_BENCHMARKS=$SITE_REPOSITORY/benchmarks_data ": f"SITE_BENCHMARKS={evaluation_data}/benchmarks ",
    }
    site = Site(cluster, scratch / "sweep", steps=400, edits=edits)
    training = site.submit("pretrain_05b.sbatch", "--nodes=1", arguments=("checkpoint.milestone_steps=100",))
    site.wait_for_step(training, 10)
    sweep = ("--benchmarks", BENCHMARKS, "--tokenizer", str(evaluation_data / "tokenizer.model"), "--every", "1")
    job = site.submit("evaluate.sbatch", arguments=("runs/mobillama_05b", *sweep))

    # One task is put back in the queue in the middle, as before its time limit: the one whose number is the array's.
    finished = site.folder / "evaluations"
    wait_for(lambda: list(finished.glob("*/tasks/*.json")), "a first task of the sweep", 240)
    [task] = [i for i in (0, 1) if cluster.task(job, i)["JobId"] == str(job)]
    cluster.command("scancel", "--batch", "--signal=USR1", f"{job}_{task}")
    site.finish(training, timeout=400)
    wait_for(lambda: not cluster.command("squeue", "-h", "-j", str(job)).strip(), "the sweep to end", 400)

    output = "".join(p.read_text() for p in (site.folder / "logs").glob("evaluate-*.out"))
    assert output.count("putting the job back in the queue") == 1, output
    assert sorted(cluster.task(job, i)["Restarts"] for i in (0, 1)) == ["0", "1"], output
    assert output.count("the run is complete; 4 milestones have their scores") == 2, output
    done = Counter(f"{m[1]} {m[2]}" for m in re.finditer(r"--(ckpt_\d+): (\S+) done", output))
    assert done == {f"ckpt_{n:03d} {task}": 1 for n in range(4) for task in TASKS}, output
    digests = {
        row.split(",")[-1] for row in (site.run_folder() / "checkpoints/checkpoints.csv").read_text().split()[1:]
    }
    scores = [json.loads(p.read_text()) for p in finished.glob("*/scores.json")]
    assert {s["digest"] for s in scores} == digests and len(scores) == 4
    assert (finished / "scores.png").stat().st_size > 10_000
