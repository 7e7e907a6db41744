"""Logs as long as a run makes them, and as a failing disk leaves them, read without being held."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.run import log as log_module
from megatron_patch.run import status
from megatron_patch.run.log import accepted_backwards, records
from megatron_patch.run.pace import Pace
from megatron_patch.train.loggers.json_lines import JsonLines

TIME = 1.7e9


def step(number: int, time: float, seconds: float = 0.5) -> dict[str, Any]:
    """About as long as a line that training writes."""
    return {
        "step": number, "time": time, "seconds": seconds, "samples": 800 * number, "tokens": 1638400 * number,
        "tokens_per_second": 3e6, "learning_rate": 3e-4, "loss": 3.25, "grad_norm": 0.5, "mfu": 0.51,
        "memory": 21_000_000_000, "held": "x" * 60,
    }  # fmt: skip


def write(log: Path, lines: list[dict[str, Any]]) -> None:
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))


def rewound(num_steps: int, every: int, back: int, seconds: Callable[[], float]) -> tuple[list[dict[str, Any]], float]:
    """A log whose ranks start again after each `every` steps, `back` steps before; and the seconds that count."""
    lines, clock, number, taken = [], TIME, 0, {}
    while number < num_steps:
        number += 1
        taken[number] = seconds()
        clock += taken[number]
        lines.append(step(number, clock, taken[number]))
        if len(lines) % every == 0:
            number, clock = number - back, clock + 60
    return lines, sum(taken.values())


def test_of_steps_made_again_the_last_ones_count_whatever_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.jsonl"
    lines, seconds = rewound(400, every=90, back=25, seconds=random.Random(1).random)
    write(log, lines)
    with log.open("a") as stream:
        stream.write('{"step": 401, "ti')  # still being written
    last = {line["step"]: line for line in lines}
    for block in (64, 333, 1 << 20):
        monkeypatch.setattr(log_module, "_BLOCK_BYTES", block)
        assert list(accepted_backwards(log)) == [last[number] for number in range(400, 0, -1)]
    pace = Pace.of(log)
    assert (pace.started, pace.is_estimate) == (lines[0]["time"] - lines[0]["seconds"], False)
    assert pace.stepping == pytest.approx(seconds)


def test_of_a_long_log_places_are_read(tmp_path: Path) -> None:
    """30,000 steps, 2,500 of them made again; its places tell the seconds that count to 2 %."""
    log = tmp_path / "log.jsonl"
    dice = random.Random(2)
    lines, seconds = rewound(30_000, every=3000, back=250, seconds=lambda: dice.uniform(0.4, 0.6))
    write(log, lines)
    assert log.stat().st_size > 5e6
    tracemalloc.start()
    pace = Pace.of(log)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()
    assert (pace.started, pace.is_estimate) == (lines[0]["time"] - lines[0]["seconds"], True)
    assert pace.stepping == pytest.approx(seconds, rel=0.02)


def test_a_resume_reads_the_end_of_a_long_log_alone(tmp_path: Path) -> None:
    """Damage of long ago stays as it is: readers leave it out, and no resume reads 208 MB to find it."""
    log = tmp_path / "log.jsonl"
    lines, _ = rewound(8000, every=9000, back=0, seconds=lambda: 0.5)
    write(log, lines)
    whole = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"damage of long ago\n" + b"".join(whole) + b'{"step": 8001, ')
    assert log.stat().st_size > 2 << 20
    for done in (7990, 7000):
        JsonLines(log, done).close()
        assert log.read_bytes() == b"damage of long ago\n" + b"".join(whole[:done])
    before = log.stat().st_ino
    JsonLines(log, 7000).close()
    assert log.stat().st_ino == before, "with nothing to drop nothing is written"


def test_a_line_that_no_training_writes_is_bounded_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    write(log, [step(1, TIME), step(2, TIME + 1)])
    whole = log.read_bytes()
    for damage in (b"[" * 3_000_000, b'{"step": ' * 1000, b"1" * 5000, b'{"step": 1, "loss": NaN}', b"[1]"):
        log.write_bytes(damage + b"\n" + whole + damage + b"\n" + damage)
        tracemalloc.start()
        assert [r["step"] for r in records(log)] == [1, 2]
        assert [r["step"] for r in accepted_backwards(log)] == [2, 1]
        assert tracemalloc.get_traced_memory()[1] < 12e6
        tracemalloc.stop()
        said = capsys.readouterr().err
        assert f"{log}, line 1: damaged" in said and f"{log}, line 4: damaged" in said


@pytest.mark.parametrize("odd", [[], {}, "9", 10**400, True, None])
def test_a_status_of_other_types_hides_no_other_run(
    odd: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {"state": "running", "updated": TIME, "step": 7, "total_steps": 9, "tokens": 70, "loss": 2.5}
    for run, content in (("a", plain), ("b", {**plain, **dict.fromkeys(_FIELDS, odd)}), ("c", plain)):
        (tmp_path / run).mkdir()
        (tmp_path / run / "status.json").write_text(json.dumps(content))
    (tmp_path / "d").mkdir()
    (tmp_path / "d/status.json").write_text("[" * 1_000_000)
    arguments = status_arguments(tmp_path)
    assert status.main(arguments) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[:2] for row in rows] == [["a", "silent"], ["b", "silent"], ["c", "silent"], ["d", "damaged"]]
    arguments.run = tmp_path / "b"
    assert status.main(arguments) == 0


_FIELDS = ("reason", "loss", "tokens_per_second", "ranks", "rank", "node", "eta_seconds", "checkpoint", "layout")


def status_arguments(runs: Path) -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    status.add_arguments(parser)
    return parser.parse_args(["--runs", str(runs)])
