"""What only a GPU can answer, in one command for a machine that is there for minutes.

    python -m benchmarks.gpu_session --data FOLDER --out FOLDER [--minutes 9]     or: make gpu-session

Parts in the order of their worth, each with a limit of its own and its own log in --out, where `session.json` has what
is known after every part, so that a session cut short (SIGTERM, Ctrl-C) keeps what it has and leaves no process behind:

    resume   the 0.5B on real text, undisturbed, then killed by SIGKILL after a durable checkpoint and started again:
             are losses and norms the same bits (`loss_compare --assert-equal`), how long does a save hold the loop
    tests    the kernels' tests (`make test-gpu`)
    layouts  TP2, PP2, DP2, TP2xPP2, TP2+SP and PP2xVPP2 as ranks on this one GPU: are losses, norms and weights within
             1e-5 of one rank's (`python -m benchmarks.one_gpu`)
    speed    tokens/s of 0.5B, 0.8B and large-base, their parts and their peers (`make bench-gpu`)

--data is a data set with rows of 2,049 ids: `make gpu-data` builds one of the demo's text where the data tools are
installed, and it may be copied.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import STARTED
from data_tools.files.durable import write_whole

STEPS, SAVED, KILLED = 18, 6, 9  # steps of a run, between its checkpoints, and after which the second run is killed
SETTINGS = (
    *("batch.global_batch_size=16", "batch.micro_batch_size=8", f"run.steps={STEPS}", "optimizer.warmup_steps=4"),
    *(f"checkpoint.interval_steps={SAVED}", "checkpoint.interval_minutes=0", "checkpoint.milestone_steps=0"),
    *("checkpoint.keep=1", "run.tensorboard=false", "watchdog.hang_minutes=3"),
)
STOOD_STILL = re.compile(r"is durable: .*the loop stood still ([\d.]+) (ms|s)\b")


class Session:
    def __init__(self, data: Path, out: Path, deadline: float) -> None:
        """`deadline` for all parts, by `time.monotonic`."""
        self.data, self.out, self.deadline = data, out, deadline
        self.results: dict[str, Any] = {}
        out.mkdir(parents=True, exist_ok=True)

    def run(self, parts: dict[str, tuple[Callable[[float], Any], float]]) -> None:
        """Each part within its own seconds and what is left of the session's."""
        for name, (part, limit) in parts.items():
            began = time.monotonic()
            seconds = min(limit, self.deadline - began)
            if seconds < 30:
                self.results[name] = "left out: the time is up"
                self._write()
                continue
            try:
                self.results[name] = "cut short"
                print(f"{name}: at most {seconds:.0f} s", flush=True)
                self.results[name] = part(seconds)
            except Exception as error:  # whatever broke this part, the next ones may answer
                self.results[name] = f"{type(error).__name__}: {error}"
            finally:
                self.results[f"{name}, seconds"] = round(time.monotonic() - began, 1)
                self._write()
            print(f"{name}: {self.results[name]}", flush=True)

    def _write(self) -> None:
        write_whole(self.out / "session.json", json.dumps(self.results, indent=1).encode() + b"\n")

    def resume(self, seconds: float) -> dict[str, Any]:
        """Two runs and what sets them apart."""
        end = time.monotonic() + seconds
        runs = self.out / "runs"
        try:
            self._train(runs / "undisturbed", end)
            latest, log = runs / "killed/checkpoints/latest", runs / "killed/log.jsonl"
            self._train(runs / "killed", end, kill_when=lambda: latest.exists() and _last_step(log) >= KILLED)
            self._train(runs / "killed", end)
            command = [sys.executable, "-m", "megatron_patch", "loss_compare", runs / "undisturbed", runs / "killed"]
            compared = subprocess.run([*command, "--assert-equal"], capture_output=True, text=True, check=False)
            text = (self.out / "undisturbed.log").read_text()
            return {
                "bit-equal": compared.returncode == 0,
                "loss_compare": compared.stdout.strip().splitlines()[-3:],
                "a save holds the loop, s": [
                    float(value) / (1000 if unit == "ms" else 1) for value, unit in STOOD_STILL.findall(text)
                ],
            }
        finally:
            for folder in runs.glob("*/checkpoints"):
                shutil.rmtree(folder)  # gigabytes

    def _train(self, run: Path, end: float, kill_when: Callable[[], bool] | None = None) -> None:
        command = [sys.executable, "-m", "megatron_patch", "train", "recipes/mobillama_05b.yaml", *SETTINGS]
        with (self.out / f"{run.name}.log").open("a") as log:
            process = subprocess.Popen(
                [*command, f"data.folder={self.data}", f"run.folder={run}"],
                stdout=log,
                stderr=subprocess.STDOUT,
                # The one rank itself: what kills a launcher leaves its ranks alive for a while.
                env={**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            )
            try:
                while process.poll() is None:
                    if time.monotonic() > end:
                        raise TimeoutError(f"{run} has not ended in its time")
                    if kill_when is not None and kill_when():
                        return
                    time.sleep(0.05)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if process.returncode or kill_when is not None:
            raise ValueError(f"training ended with {process.returncode}: see {self.out / (run.name + '.log')}")

    def tests(self, seconds: float) -> list[str]:
        """The last lines of the kernels' tests."""
        command = [sys.executable, "-m", "pytest", "tests/kernels", "-p", "no:cacheprovider"]
        return self._logged("tests", command, seconds, TESTS_ON_GPU="1")[-12:]

    def layouts(self, seconds: float) -> dict[str, Any]:
        """Each layout's largest differences from one rank; the ranks' logs stand in --out."""
        from benchmarks import one_gpu  # takes seconds, of which the parts before need none

        found = one_gpu.compare(one_gpu.ALL, self.out / "layouts", seconds)
        return {f"within {one_gpu.TOLERANCE:g} of one rank": one_gpu.verdict(found), **found}

    def speed(self, seconds: float) -> list[str]:
        """The benchmark's own tables stand in --out."""
        minutes = f"{(seconds - 15) / 60:.2f}"  # it ends by itself before it is ended
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(self.out), "--minutes", minutes]
        return self._logged("speed", command, seconds)[-3:]

    def _logged(self, name: str, command: list[str], seconds: float, **environment: str) -> list[str]:
        log = self.out / f"{name}.log"
        with log.open("w") as stream:
            subprocess.run(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                env={**os.environ, **environment},
                check=False,
            )
        return log.read_text().splitlines()


def _last_step(log: Path) -> int:
    found = re.findall(r'"step": (\d+)', log.read_text()) if log.exists() else []
    return int(found[-1]) if found else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="What only a GPU can answer, in one command")
    parser.add_argument("--data", type=Path, required=True, help="data set with rows of 2,049 ids (make gpu-data)")
    parser.add_argument("--out", type=Path, default=Path("gpu_session"), help="folder for logs and results")
    parser.add_argument("--minutes", type=float, default=9, help="for all parts, from the start of this process")
    arguments = parser.parse_args()
    session = Session(arguments.data, arguments.out, STARTED + 60 * arguments.minutes)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    session.run(
        {
            "resume": (session.resume, 210),
            "tests": (session.tests, 120),
            "layouts": (session.layouts, 75),
            "speed": (session.speed, 300),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
