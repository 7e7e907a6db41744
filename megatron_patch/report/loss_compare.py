"""`python -m megatron_patch loss_compare A B`: the losses of two runs, compared step by step.

A change that claims speed shows that losses stay what they were: bit-equal where it moves no arithmetic
(--assert-equal), within a stated bound where it reorders sums (--bound).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_patch.arguments import amount, count
from megatron_patch.run.log import DAMAGED, record_of, whole_lines

VALUES = ("loss", "grad_norm", "held_out_loss")


class Point(NamedTuple):
    """A logged number: what and at which step. A value that was not finite is logged as None."""

    value: str
    step: int


class ComparisonError(ValueError):
    """Logs that cannot be compared: names the file, the place and the remedy."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, help="run folder or log.jsonl")
    parser.add_argument("b", type=Path, help="run folder or log.jsonl")
    parser.add_argument("--steps", type=count, metavar="N", help="compare steps 1 to N; default: the shorter run's")
    demand = parser.add_mutually_exclusive_group()
    demand.add_argument("--assert-equal", action="store_true", help="every number the same bits, else exit code 1")
    demand.add_argument(
        "--bound", type=amount, metavar="X", help="every relative difference at most X, else exit code 1"
    )


def main(args: argparse.Namespace) -> int:
    """Exit code 0: alike as demanded; 1: not; 2: cannot be compared."""
    try:
        a, b = read(args.a), read(args.b)
        rows = list(compare(a, b, args.steps))
    except (ComparisonError, OSError) as error:
        print(f"loss_compare: {error}", file=sys.stderr)
        return 2
    bound = 0.0 if args.assert_equal else args.bound
    failed = False
    for value in VALUES:
        differences = {point.step: off for point, off in rows if point.value == value}
        if not differences:
            continue
        unequal = [step for step, off in differences.items() if off != 0]
        worst = max(differences, key=lambda step: differences[step])
        line = f"{value:<14} {len(differences):>7,} steps, {len(differences) - len(unequal):,} equal"
        if unequal:
            line += f"; first difference at step {unequal[0]:,}, largest {differences[worst]:.1e} at step {worst:,}"
        if bound is not None and differences[worst] > bound:
            failed = True
            line += f"  > {bound:g}"
        print(line)
    return int(failed)


def read(place: Path) -> dict[Point, float | None]:
    """The numbers of a log. Where a resumed run logged a step again, the later line counts.

    A last line that is still being written is left out.
    """
    file = place / "log.jsonl" if place.is_dir() else place
    points: dict[Point, float | None] = {}
    for number, line in whole_lines(file):
        where = f"{file}, line {number}"
        try:
            record = record_of(line)
            points |= {Point(v, record["step"]): record[v] for v in VALUES if v in record}
        except DAMAGED as error:
            raise ComparisonError(f"{where}: not a line of a log.jsonl ({error})") from error
    return points


def compare(
    a: dict[Point, float | None], b: dict[Point, float | None], steps: int | None = None
) -> Iterator[tuple[Point, float]]:
    """Relative difference |a - b| / |b| of every number that both logs should hold, in order of steps.

    0 where both are not finite, infinity where one is. Raises ComparisonError where a step up to `steps` (else up to
    the last step of the shorter log) is in one log only, or none is in both. The score of the shorter run's end is
    left out where the longer one has none there.
    """
    last = min(max((p.step for p in log if p.value == "loss"), default=0) for log in (a, b))
    if not last:
        raise ComparisonError("a log without a single step; has the run begun?")
    if steps is not None and steps > last:
        raise ComparisonError(f"--steps {steps}: the shorter run ends at step {last}")
    points = {p for p in (*a, *b) if p.step <= (steps or last)}
    end = Point("held_out_loss", last)  # a run is scored after its last step, which need not be the other's turn
    if end not in a or end not in b:
        points.discard(end)
    for point in sorted(points, key=lambda p: (p.step, VALUES.index(p.value))):
        if point not in a or point not in b:
            raise ComparisonError(f"step {point.step}: {point.value} is in one log only; were both runs whole?")
        x, y = a[point], b[point]
        if x == y:
            yield point, 0.0
        else:
            yield point, float("inf") if x is None or y is None or y == 0 else abs(x - y) / abs(y)
