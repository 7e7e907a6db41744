"""Checks of nodes as `status` lists them, beside the runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from megatron_patch import launch
from megatron_patch.run import checks, status


def check_of(folder: Path, when: float, **verdict: object) -> None:
    folder.mkdir(parents=True)
    if verdict:
        launch.write_json(folder / "verdict.json", verdict)
    os.utime(folder, (when, when))


def test_status_lists_checks_of_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, logs = tmp_path / "runs", tmp_path / "logs"
    args = argparse.Namespace(run=None, runs=runs, logs=logs)
    assert status.main(args) == 2
    check_of(logs / "preflight/12.0", 1e9, good=["dgx01", "dgx03"], bad={"dgx07": "slow", "dgx02": "silent"})
    check_of(runs / "demo/check/node-1-2", 2e9)  # now, or to come
    check_of(logs / "preflight/9.0", 0.9e9)
    check_of(logs / "preflight/8.0", 0.8e9, good="dgx01")
    (logs / "preflight/note").touch()
    capsys.readouterr()
    assert status.main(args) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert title.split() == ["check", "as", "of", "healthy", "unhealthy", "nodes"]
    told = [(Path(row.split()[0]).name, *row.split()[3:]) for row in rows]
    assert told == [
        ("8.0", "damaged", "-"),
        ("9.0", "none", "-"),
        ("12.0", "2/4", "dgx02,", "dgx07"),
        ("node-1-2", "running", "-"),
    ]
    launch.write_json(runs / "demo/status.json", {"state": "completed", "updated": 1e9, "step": 3})
    for number in range(20):
        check_of(logs / f"preflight/new.{number}", 3e9 + number, good=["dgx01"], bad={})
    assert status.main(args) == 0
    first, run, empty, *table = capsys.readouterr().out.splitlines()
    assert first.startswith("run ") and run.startswith("demo ") and not empty
    assert [Path(row.split()[0]).name for row in table[1:]] == [f"new.{number}" for number in range(10, 20)]
    assert len(table) == 1 + checks.MOST
