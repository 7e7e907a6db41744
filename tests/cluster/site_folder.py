"""A site: the templates unedited, a filled-in site.sh, and a tiny recipe in the place of each published one."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from slurm_cluster import Cluster, wait_for

REPOSITORY = Path(__file__).resolve().parent.parent.parent

# What differs from a real cluster: the virtual environment of the tests, one rank a node, on the CPU (Slurm's
# pretended GPUs would name real ones), and thresholds for two cores that all pretended nodes share. As a module's
# script would, it reads a variable that is not set, and moves.
SITE_EDITS = {
    'source "$SITE_REPOSITORY/.venv/bin/activate"': (
        f'cd / && MODULES=/opt:$MODULES PATH="{Path(sys.executable).parent}:$PATH"'
    ),
    "SITE_RANKS_PER_NODE=8 ": "SITE_RANKS_PER_NODE=1 ",
    "SITE_WRAPPER=()": "SITE_WRAPPER=(env CUDA_VISIBLE_DEVICES=)",
    "SITE_PREFLIGHT_OPTIONS=()": (
        "SITE_PREFLIGHT_OPTIONS=(--slow 0.0001 --slow-network 0.01 --slow-disk 0.0001 --patience 60)"
    ),
}

FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL"}

ROWS_PER_SEGMENT, NUM_SEGMENTS, SEQUENCE_LENGTH, VOCAB_SIZE = 700, 4, 32, 512
SHAPE = ("--row-length", str(SEQUENCE_LENGTH + 1), "--vocab-size", str(VOCAB_SIZE))
TINY = {
    "extends": "base.yaml",
    "precision": "fp32",
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "vocab_size": VOCAB_SIZE,
        "sequence_length": SEQUENCE_LENGTH,
        "shared_ffn": True,
    },
    "batch": {"global_batch_size": 6, "micro_batch_size": 3},
    "optimizer": {"warmup_steps": 2},
    "checkpoint": {"interval_steps": 20, "interval_minutes": 0, "milestone_steps": 0},
    "watchdog": {"hang_minutes": 0.5},
}


def write_raw_rows(folder: Path) -> None:
    """Amber's JSONL form at a toy size, from a fixed seed."""
    folder.mkdir()
    generator = random.Random(1)
    for segment in range(NUM_SEGMENTS):
        rows = (
            {"token_ids": generator.choices(range(VOCAB_SIZE), k=SEQUENCE_LENGTH + 1), "source": "c4"}
            for _ in range(ROWS_PER_SEGMENT)
        )
        (folder / f"train_{segment:03d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Site:
    """A folder as a site would have it, on a cluster."""

    def __init__(self, cluster: Cluster, folder: Path, steps: int = 60, edits: Mapping[str, str] = {}) -> None:
        self.cluster, self.folder = cluster, folder / "projet à part"  # a site's paths are not ours to choose
        folder = self.folder
        folder.mkdir(parents=True)
        shutil.copytree(REPOSITORY / "slurm", folder / "slurm")
        shutil.copytree(REPOSITORY / "recipes", folder / "recipes")
        for package in ("megatron_patch", "data_tools"):
            (folder / package).symlink_to(REPOSITORY / package)
        for recipe in (folder / "recipes").glob("*.yaml"):
            if recipe.stem not in ("base", "demo"):
                recipe.write_text(yaml.safe_dump({**TINY, "name": recipe.stem, "run": {"steps": steps}}))
        for line, edited in {**SITE_EDITS, **edits}.items():
            self.edit(line, edited)

    def edit(self, line: str, edited: str) -> None:
        """What an admin does to site.sh."""
        site = self.folder / "slurm/site.sh"
        text = site.read_text()
        assert text.count(line) == 1, f"site.sh no longer has the line {line!r}"
        site.write_text(text.replace(line, edited))

    def put_before(self, program: str, script: str) -> None:
        """Jobs find `script` in the place of a Slurm client; `$real` is the client itself."""
        gate = self.folder / "gate"
        if not gate.exists():
            gate.mkdir()
            self.edit("cd / && ", f"PATH={shlex.quote(str(gate))}:$PATH; cd / && ")
        (gate / program).write_text(f"#!/bin/bash\nreal={shutil.which(program)}\n{script}\n")
        (gate / program).chmod(0o755)

    def submit(self, template: str, *options: str, arguments: tuple[str, ...] = (), path: Path | None = None) -> int:
        """Source site.sh and sbatch a template from a folder that is not the repository; returns the job's number.

        The submitting shell is that of somebody who works with another Python and CDPATH, inside another allocation,
        and who has `path` before the other folders of commands, as the job then has too.
        """
        command = ["sbatch", "--parsable", *options, str(self.folder / "slurm" / template), *arguments]
        script = 'cd "$1"; source slurm/site.sh; shift; cd /; exec "$@"'
        shell = {"PYTHONPATH": str(self._other_python()), "CDPATH": ".", "SLURM_MEM_PER_CPU": "100"}
        if path is not None:
            shell["PATH"] = f"{path}:{self.cluster.environment['PATH']}"
        done = self.cluster.command("bash", "-c", script, "submit", self.folder, *command, **shell)
        return int(done.split()[-1])

    def _other_python(self) -> Path:
        folder = self.folder / "other python"
        folder.mkdir(exist_ok=True)
        (folder / "yaml.py").write_text('raise SystemExit("a package of another Python")\n')
        return folder

    def output(self, job: int) -> str:
        """What Slurm wrote for a job."""
        return "".join(p.read_text() for p in sorted((self.folder / "logs").glob(f"*-{job}.out")))

    def run_folder(self, name: str = "mobillama_05b") -> Path:
        return self.folder / "runs" / name

    def status(self) -> dict[str, Any]:
        return json.loads((self.run_folder() / "status.json").read_text())

    def steps(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl that are steps; the last line may be cut short while it is written."""
        try:
            lines = (self.run_folder() / "log.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return [record for record in records if "loss" in record]

    def wait_for_step(self, job: int, step: int, timeout: float = 240) -> None:
        def reached() -> bool:
            assert self.cluster.job(job)["JobState"] not in FINAL_STATES, self.output(job)
            return any(record["step"] >= step for record in self.steps())

        wait_for(reached, f"step {step} of job {job}\n{self.output(job)}", timeout)

    def finish(self, job: int, timeout: float = 300, expected: str = "COMPLETED") -> str:
        """Wait until a job has left the queue for good; returns its output, asserts how it ended."""

        def ended() -> str | None:
            state = self.cluster.job(job)["JobState"]
            return state if state in FINAL_STATES else None

        try:
            state = wait_for(ended, f"job {job} to end", timeout, step=0.5)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.cluster.command('squeue')}{self.output(job)}") from None
        output = self.output(job)
        assert state == expected, f"job {job} is {state}\n{output}"
        return output

    def accepted(self) -> list[tuple[int, float, float]]:
        """Step, loss and gradient norm of the run's accepted history: of a step done again, the last time counts."""
        last = {record["step"]: (record["step"], record["loss"], record["grad_norm"]) for record in self.steps()}
        return sorted(last.values())

    def weights(self) -> dict[str, bytes]:
        """The bytes of the newest checkpoint's tensors by file."""
        checkpoints = self.run_folder() / "checkpoints"
        newest = checkpoints / (checkpoints / "latest").read_text().strip()
        return {p.name: p.read_bytes() for p in sorted(newest.glob("*.safetensors"))}
