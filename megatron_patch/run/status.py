"""How runs stand: `python -m megatron_patch status RUN`, or all of them without an argument.

Reads what training and the launcher left in the run folder; starts at once, imports no torch, changes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from megatron_patch.run import checks
from megatron_patch.run.attempts import attempts, checkpoint_step, read_status
from megatron_patch.run.lock import is_abandoned
from megatron_patch.run.log import is_number
from megatron_patch.run.pace import Pace
from megatron_patch.run.planned import against_plan, measured_energy

# A running job writes its status every few seconds; after this long it is not running, whatever the file says.
SILENCE = 600.0
_LAST_DAY = 1e11  # seconds since 1970: of the calendar's years of four digits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, nargs="?", help="a run folder; none: every run below --runs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where runs are (runs)")
    parser.add_argument(
        "--logs", type=Path, default=Path("logs"), metavar="FOLDER", help="where checks of nodes are (logs)"
    )


def main(args: argparse.Namespace) -> int:
    """Exit code 2: there is no such run."""
    if args.run is not None:
        if not (args.run / "status.json").exists():
            print(f"{args.run}: no run here (status.json is missing); runs are folders below runs/", file=sys.stderr)
            return 2
        if not _told(args.run):
            print(f"{args.run / 'status.json'}: damaged; the next attempt writes a new one", file=sys.stderr)
            return 2
        print("\n".join(Standing.of(args.run).lines()))
        return 0
    runs = sorted(path.parent for path in args.runs.glob("*/status.json"))
    of_checks = checks.lines(args.runs, args.logs)
    if not runs and of_checks:
        print(*of_checks, sep="\n")
        return 0
    if not runs:
        print(f"{args.runs}: no runs; name a run folder, or the folder of runs with --runs", file=sys.stderr)
        return 2
    print(f"{'run':<28} {'state':<10} {'step':>17} {'ETA':>16} {'effective':>9}  last word")
    for run in runs:
        try:
            print(Standing.of(run).row())
        except OSError as error:  # another's run, of which this user may not read all, ends no listing
            print(f"{run.name:<28} unreadable  {error.filename}: {error.strerror}")
    if of_checks:
        print("", *of_checks, sep="\n")
    return 0


@dataclass(frozen=True)
class Standing:
    """A run as its folder tells it."""

    run: Path
    status: Mapping[str, Any]
    num_attempts: int
    checkpoint: int
    started: float | None  # seconds since 1970, of the first attempt
    pace: Pace
    is_abandoned: bool  # no process of this node trains there any more

    @classmethod
    def of(cls, run: Path) -> Standing:
        pace, starts = Pace.of(run / "log.jsonl"), attempts(run)
        started = [start["started"] for start in starts]
        started += [] if pace.started is None else [pace.started]
        return cls(
            run=run,
            status=_told(run),
            num_attempts=len(starts) or 1,
            checkpoint=checkpoint_step(run),
            started=min(started, default=None),
            pace=pace,
            is_abandoned=is_abandoned(run),
        )

    @property
    def state(self) -> str:
        """As the file says; `gone` where it names a training of this node whose processes have ended without a word,
        `silent` where it has said nothing for long, `damaged` where it cannot be read."""
        if not self.status:
            return "damaged"
        if self.status["state"] in ("starting", "running"):
            if self.is_abandoned:
                return "gone"
            if time.time() - self.status["updated"] > SILENCE:
                return "silent"
        return str(self.status["state"])

    @property
    def effective(self) -> float | None:
        """Share of the time since the first attempt began that went into steps that count."""
        if self.started is None or not self.status or self.status["updated"] <= self.started:
            return None
        return min(self.pace.stepping / (self.status["updated"] - self.started), 1.0)

    @property
    def eta(self) -> str:
        seconds = self.status.get("eta_seconds")
        if not is_number(seconds) or not 0 <= seconds < _LAST_DAY or self.state not in ("running", "stopped"):
            return "-"
        return str(timedelta(seconds=round(seconds)))

    def lines(self) -> list[str]:
        s = self.status
        effective = "-" if self.effective is None else f"{self.effective:.1%}"
        lines = [
            f"run          {self.run}",
            f"state        {self.state}, {_ago(s['updated'])}",
            f"attempt      {self.num_attempts}" + (f", {s['ranks']} ranks" if "ranks" in s else ""),
            f"step         {s.get('step', 0):,} of {s.get('total_steps', 0):,}",
            f"tokens       {s.get('tokens', 0):,}",
        ]
        if s.get("withheld"):
            lines.append(f"withheld     {s['withheld']:,} updates (skipped by the watchdog; log.jsonl says why)")
        if is_number(s.get("loss")):
            lines.append(f"loss         {s['loss']:.4f}, {s.get('tokens_per_second', 0):,.0f} tokens/s")
        if is_number(rate := s.get("tokens_per_second")) and (
            beside := against_plan(self.run, rate, s.get("ranks"), self.pace.rates)
        ):
            lines.append(f"plan         {beside}")
        if energy := measured_energy(self.run, self.pace):
            lines.append(f"energy       {energy}")
        lines += [
            f"ETA          {self.eta}",
            "checkpoint   " + (f"step {self.checkpoint:,}" if self.checkpoint else "none yet"),
            f"effective    {effective} of the time since the first attempt"
            + (", estimated from places of the log" if self.pace.is_estimate else ""),
        ]
        if self.state == "gone":
            lines.append(f"last word    none: it said {s['state']}, but its processes are gone; start it again")
        if s.get("reason"):
            lines.append(f"last word    {s['reason']}")
            if s["state"] == "failed" and "rank" in s:
                lines.append(f"             rank {s['rank']} on {s.get('node', 'an unknown node')}")
        return lines

    def row(self) -> str:
        s = self.status
        step = f"{s.get('step', 0):,}/{s.get('total_steps', 0):,}"
        effective = "-" if self.effective is None else f"{self.effective:.1%}"
        return f"{self.run.name:<28} {self.state:<10} {step:>17} {self.eta:>16} {effective:>9}  {s.get('reason') or ''}"


def _told(run: Path) -> dict[str, Any]:
    """RUN/status.json; empty where it is damaged, without what is of a type that no training writes."""
    status = read_status(run)
    if not 0 <= status.get("updated", -1) < _LAST_DAY:
        return {}
    texts, numbers = ("reason", "node"), ("loss", "tokens_per_second", "ranks", "rank", "eta_seconds")
    odd = {name for name in texts if not isinstance(status.get(name), str)}
    odd |= {name for name in numbers if not is_number(status.get(name))}
    return {name: value for name, value in status.items() if name not in odd}


def _ago(moment: float) -> str:
    return (
        f"as of {datetime.fromtimestamp(moment):%F %T} ({timedelta(seconds=max(0, round(time.time() - moment)))} ago)"
    )
