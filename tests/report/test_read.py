"""Restarts, thinned curves, units and the comparison with the paper's Table 1."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_patch.__main__ import main
from megatron_patch.report.read import read_run, restarts
from megatron_patch.report.series import Axes, thin


def steps(*ends: float) -> list[dict[str, float]]:
    """Steps of a second each that ended at these times."""
    return [{"step": i, "seconds": 1.0, "time": end} for i, end in enumerate(ends, 1)]


def test_a_restart_costs_the_time_without_a_kept_step() -> None:
    made = steps(11, 12, 13, 50, 51, 90)
    (first, second) = restarts(made, [5.0, 40.0, 80.0])
    assert (first.time, first.step, first.lost) == (49.0, 3, 36.0)
    assert (second.time, second.step, second.lost) == (89.0, 5, 38.0)


def test_starts_that_made_no_step_are_one_restart() -> None:
    made = steps(11, 12, 60)
    (only,) = restarts(made, [5.0, 20.0, 30.0, 40.0])
    assert (only.step, only.lost) == (2, 47.0)
    assert restarts(made, [5.0, 20.0, 70.0]) == [only]  # the last has made none yet


def test_a_restart_before_the_first_kept_step() -> None:
    (only,) = restarts(steps(31), [5.0, 25.0])
    assert (only.step, only.lost) == (0, 5.0)


def test_real_run(run: Path, evaluations: Path) -> None:
    found = read_run(run, evaluations)
    assert [s["step"] for s in found.steps] == list(range(1, 61))
    assert [h["step"] for h in found.held_out] == [20, 40, 60]
    (restart,) = found.restarts
    assert restart.step in (12, 24, 36, 48)  # the newest restart point that was durable when it was killed
    assert restart.lost > 0
    assert [m["name"] for m in found.milestones] == ["ckpt_000", "ckpt_001", "ckpt_002"]
    assert len(found.scores) == 3
    assert found.mix is not None
    assert "git" in found.environment


def test_thin_keeps_every_peak() -> None:
    records = [{"time": float(i), "value": 1.0} for i in range(10_000)]
    records[1234]["value"], records[7777]["value"], records[5]["value"] = 9.0, -3.0, None  # type: ignore[assignment]
    kept = thin(records, "value", 100)
    assert len(kept) <= 100
    assert {9.0, -3.0} <= {r["value"] for r in kept}
    assert [r["time"] for r in kept] == sorted(r["time"] for r in kept)
    assert thin(records[:50], "value", 100) == [r for r in records[:50] if r["value"] is not None]


def test_units_suit_the_run() -> None:
    assert Axes.of(0, 90_000, 3e9).time_unit == "hours"
    assert Axes.of(0, 200, 5e5).token_unit == "thousand tokens"
    assert Axes.of(100, 200, 5e6).at(160, 2e6) == {"time": 1.0, "tokens": 2.0}


def test_compare(run: Path, evaluations: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(run), "recipes/mobillama_05b.yaml", "recipes/baseline1.yaml", "--evaluations", str(evaluations)]
    assert main(["report", "--compare", *arguments]) == 0
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in capsys.readouterr().out.splitlines()}
    assert "| large-base | paper, A100 | 1.2B | 1,259.13 | 46,100.00 | 6.00 | - | 49.06 |" in lines.values()
    assert lines["mobillama_05b"].startswith("| mobillama_05b | planned | 534,865,920 | -")
    assert "7.73" in lines["mobillama_05b"]
    assert "| 100.00 |" in lines["baseline1"]
    assert "| completed |" in lines["demo"]
    assert lines["demo"].endswith("| 32.00 |")
