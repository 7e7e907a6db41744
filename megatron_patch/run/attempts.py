"""Whether a run is started (again): the decisions of slurm/launch.sh before and after an attempt.

    python -m megatron_patch.run.attempts begin RECIPE [key=value ...]
                                            prints: go ATTEMPT FOLDER | complete | stop | give-up | busy
    python -m megatron_patch.run.attempts end FOLDER
                                            prints: again | complete | stop | give-up

An attempt is one start of all ranks. Its record, RUN/environment/attempt_N.json, is written before the ranks start, so
that an attempt that a dead node cut short counts too. Nothing here imports torch.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from pathlib import Path
from typing import Any, Literal

from data_tools.files.plain_file import read_plain
from megatron_patch import launch, recipe
from megatron_patch.run.lock import RunBusy, wait_until_free
from megatron_patch.run.log import is_number

Decision = Literal["go", "again", "complete", "stop", "give-up", "busy"]

STOP_NAME = "STOP"
_NUMBERS = ("updated", "step", "total_steps", "samples", "tokens", "withheld")
REFUSED = "refused: "
"""How the reason of an attempt begins that ended before its first step because its input does not fit."""


def read_status(run: Path) -> dict[str, Any]:
    """RUN/status.json; empty where the run has none yet, or a damaged one: the checkpoints say where it stands."""
    status = launch.read_json(run / "status.json")
    numbers = [status[name] for name in _NUMBERS if name in status]
    return status if isinstance(status.get("state"), str) and all(map(is_number, numbers)) else {}


def checkpoint_step(run: Path) -> int:
    """Step of the newest finished checkpoint; 0 before the first."""
    try:
        name = read_plain(run / "checkpoints/latest").decode().strip()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):  # training looks at the checkpoints themselves
        return 0
    digits = re.search(r"(\d+)$", name)
    return int(digits.group()) if digits else 0


def attempts(run: Path) -> list[dict[str, Any]]:
    """Records of the run's attempts, oldest first; a damaged one is left out."""
    records = [launch.read_json(path) for path in (run / "environment").glob("attempt_*.json")]
    whole = [r for r in records if all(is_number(r.get(name)) for name in ("attempt", "started", "checkpoint_step"))]
    return sorted(whole, key=lambda record: record["attempt"])


def fruitless(run: Path, series: str) -> int:
    """Attempts of one submission, up to the last, since a checkpoint was last added.

    A `series` is a Slurm job with its requeues, or a chain; a new submission starts with a clean slate.
    """
    step, count = checkpoint_step(run), 0
    for record in reversed(attempts(run)):
        if record["checkpoint_step"] != step:
            break
        count += record["series"] == series  # two jobs of one run take turns; neither may clear the other's count
    return count


def decide(run: Path, series: str, limit: int) -> tuple[Decision, str]:
    """What becomes of a run between two attempts, and why. `limit` is the fruitless attempts after which it ends."""
    status = read_status(run)
    if status.get("state") == "completed":
        return "complete", f"the run is complete at step {status.get('step')}"
    if (run / STOP_NAME).exists():
        return "stop", f"{run / STOP_NAME} exists; remove it and submit again to go on"
    if (count := fruitless(run, series)) >= limit:
        last = f"; the last one: {status['reason']}" if status.get("reason") else ""
        return "give-up", f"{count} attempts without a new checkpoint after step {checkpoint_step(run)}{last}"
    return "again", f"the run stands at checkpoint step {checkpoint_step(run)}"


def is_refused(run: Path) -> bool:
    """Whether the last attempt found that recipe, data set and checkpoint do not fit: the next would find the same."""
    status = read_status(run)
    return status.get("state") == "failed" and str(status.get("reason")).startswith(REFUSED)


def goes_further(run: Path, settings: recipe.Recipe) -> bool:
    """Whether a run that is complete was asked for other steps than now: training finds out what is left to do."""
    try:
        return recipe.load(run / "recipe.yaml").run.steps != settings.run.steps
    except recipe.RecipeError:
        return False


def begin(
    run: Path, settings: recipe.Recipe, series: str, limit: int, nodes: list[str], patience: float
) -> tuple[Decision, str]:
    """Decide, and record the attempt that starts. A training that still ends there is given `patience` seconds."""
    try:
        wait_until_free(run, patience, lambda text: print(text, file=sys.stderr, flush=True))
    except RunBusy as error:
        return "busy", f"{error}; submit again when it has ended, or give this one another run.folder"
    decision, why = decide(run, series, limit)
    if decision == "complete" and goes_further(run, settings):
        launch.write_json(run / "status.json", {**read_status(run), "state": "stopped", "reason": "run.steps changed"})
        decision, why = decide(run, series, limit)
    if decision != "again":
        return decision, why
    number = new_attempt(run)
    record = {
        "attempt": number,
        "series": series,
        "started": time.time(),
        "checkpoint_step": checkpoint_step(run),
        **launch.snapshot(settings.model_dump(mode="json"), nodes),
    }
    launch.write_json(run / f"environment/attempt_{number}.json", record)
    return "go", str(number)


def new_attempt(run: Path) -> int:
    """The next attempt's number, and its folder RUN/logs/attempt_N: of two jobs that begin at once each has its own."""
    number = 1 + max((record["attempt"] for record in attempts(run)), default=0)
    while True:
        with contextlib.suppress(FileExistsError):
            (run / f"logs/attempt_{number}").mkdir(parents=True)
            return number
        number += 1


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_patch.run.attempts", description=__doc__)
    phases = parser.add_subparsers(dest="phase", required=True)
    first = phases.add_parser("begin")
    first.add_argument("recipe", type=Path)
    first.add_argument("overrides", nargs="*")
    first.add_argument("--nodes", nargs="*", default=[])
    # The file system of a node that died lets go of its locks after a minute or two.
    first.add_argument("--patience", type=float, default=240, help="seconds to wait for a training that still ends")
    last = phases.add_parser("end")
    last.add_argument("run", type=Path)
    for phase in (first, last):
        phase.add_argument("--series", required=True)
        phase.add_argument("--limit", type=int, required=True)
    args = parser.parse_args(argv)
    if args.phase == "begin":
        try:
            settings = recipe.load(args.recipe, args.overrides)
        except recipe.RecipeError as error:
            print(error, file=sys.stderr)
            return 2
        run = settings.run_folder.resolve()
        try:
            decision, why = begin(run, settings, args.series, args.limit, args.nodes, args.patience)
        except OSError as error:
            remedy = "make it writable from every node (SITE_RUNS in slurm/site.sh), or choose another run.folder"
            print(f"refused: run.folder {run}: cannot be written ({error}); {remedy}", file=sys.stderr)
            return 2
        if decision == "go":
            print(decision, why, run)
            return 0
    elif all(record.get("series") != args.series for record in attempts(args.run)):  # `begin` has left one there
        print("give-up")
        print(
            f"{args.run} is no longer the folder in which this attempt began (deleted, renamed, replaced): restore it, "
            "or name the one that holds its checkpoints as run.folder, and submit again",
            file=sys.stderr,
        )
        return 0
    else:
        run = args.run
        decision, why = decide(run, args.series, args.limit)
        if decision == "again" and is_refused(run):
            decision, why = "give-up", read_status(run)["reason"]
    if decision in ("stop", "give-up"):
        launch.write_json(
            run / "status.json",
            {
                **read_status(run),
                "state": "stopped" if decision == "stop" else "failed",
                "reason": why,
                "updated": time.time(),
            },
        )
    print(decision)
    print(why, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
