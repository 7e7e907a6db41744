"""Decisions between attempts, and what `status` tells, on run folders as training and the launcher write them."""

from __future__ import annotations

import argparse
import json
import os
import platform
import threading
import time
from pathlib import Path

import pytest

from megatron_patch import launch, recipe
from megatron_patch.run import attempts, status
from megatron_patch.run.lock import RunLock
from megatron_patch.run.status_file import StatusFile

SETTINGS = recipe.load("recipes/demo.yaml")


def finish_checkpoint(run: Path, step: int) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints/latest").write_text(f"step_{step:08d}\n")


def begin(
    run: Path, series: str = "job-1", limit: int = 2, settings: recipe.Recipe = SETTINGS, patience: float = 0
) -> attempts.Decision:
    return attempts.begin(run, settings, series, limit, ["dgx01"], patience)[0]


def test_attempts_without_progress_are_counted_even_when_nothing_ended_them(tmp_path: Path) -> None:
    assert begin(tmp_path) == "go"
    finish_checkpoint(tmp_path, 10)
    assert begin(tmp_path) == "go"
    assert attempts.decide(tmp_path, "job-1", 2)[0] == "again"
    assert begin(tmp_path) == "go"
    assert begin(tmp_path) == "give-up"
    finish_checkpoint(tmp_path, 20)
    assert begin(tmp_path) == "go", "progress clears the count"
    assert [record["attempt"] for record in attempts.attempts(tmp_path)] == [1, 2, 3, 4]


def test_a_new_submission_starts_with_a_clean_slate(tmp_path: Path) -> None:
    assert [begin(tmp_path) for _ in range(3)] == ["go", "go", "give-up"]
    assert begin(tmp_path, series="job-2") == "go"


def test_two_submissions_of_a_hopeless_run_that_take_turns_both_end(tmp_path: Path) -> None:
    assert [begin(tmp_path, series=f"job-{job}") for job in (1, 2, 1, 2)] == ["go"] * 4
    assert [begin(tmp_path, series=f"job-{job}") for job in (1, 2)] == ["give-up"] * 2


def test_two_jobs_that_begin_at_once_have_a_number_and_a_folder_each(tmp_path: Path) -> None:
    assert [attempts.new_attempt(tmp_path) for _ in range(2)] == [1, 2]  # before either has left its record
    assert sorted(p.name for p in (tmp_path / "logs").iterdir()) == ["attempt_1", "attempt_2"]


def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    command = ["begin", "recipes/demo.yaml", f"run.folder={tmp_path / 'file/run'}", "--series", "job-1", "--limit", "3"]
    assert attempts.main(command) == 2
    assert f"refused: run.folder {tmp_path / 'file/run'}: cannot be written" in capsys.readouterr().err


def test_refused_input_is_not_tried_again_until_it_is_submitted_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert begin(tmp_path) == "go"
    training = StatusFile(tmp_path, 0)
    training.refuse("data.folder: not set")
    assert attempts.main(["end", str(tmp_path), "--series", "job-1", "--limit", "3"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("give-up\n", "refused: data.folder: not set\n")
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == "refused: data.folder: not set"
    del training  # lets go of the run folder
    assert begin(tmp_path, series="job-2") == "go"


def test_a_complete_run_and_a_stop_file_start_nothing(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    decision, why = attempts.decide(tmp_path, "job-1", 2)
    assert decision == "stop" and "remove it and submit again" in why
    launch.write_json(tmp_path / "status.json", {"state": "completed", "step": 5})
    assert begin(tmp_path) == "complete"
    assert not attempts.attempts(tmp_path)


def test_a_complete_run_that_is_asked_for_more_steps_goes_on(tmp_path: Path) -> None:
    launch.write_json(tmp_path / "status.json", {"state": "completed", "step": 200})
    (tmp_path / "recipe.yaml").write_text(SETTINGS.to_yaml())
    assert begin(tmp_path) == "complete"
    longer = recipe.load("recipes/demo.yaml", ["run.steps=300"])
    assert begin(tmp_path, settings=longer) == "go"
    # Should its ranks never start, the old word must not end the series.
    assert attempts.decide(tmp_path, "job-1", 2)[0] == "again"


def test_a_run_that_trains_elsewhere_is_not_started_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch.write_json(tmp_path / "status.json", {"state": "running", "step": 7})
    other = RunLock(tmp_path)
    decision, why = attempts.begin(tmp_path, SETTINGS, "job-2", 2, ["dgx01"], 0)
    assert decision == "busy" and f"another training runs here: process {os.getpid()} on {platform.node()}" in why
    assert status.read_status(tmp_path) == {"state": "running", "step": 7}
    assert not attempts.attempts(tmp_path)
    threading.Timer(0.2, other.release).start()
    assert begin(tmp_path, patience=60) == "go", "one that is about to end is waited for"
    assert "waiting up to 60 s for its end" in capsys.readouterr().err


def test_a_damaged_record_does_not_end_a_series(tmp_path: Path) -> None:
    assert begin(tmp_path) == "go"
    (tmp_path / "status.json").write_text("{")
    (tmp_path / "environment/attempt_1.json").write_bytes(b"\0\0")
    (tmp_path / "environment/attempt_9.json").write_text('{"attempt": "9"}')
    assert begin(tmp_path) == "go"
    assert [record["attempt"] for record in attempts.attempts(tmp_path)] == [2]


def test_ten_attempts_are_in_order(tmp_path: Path) -> None:
    for step in range(11):
        finish_checkpoint(tmp_path, step)
        begin(tmp_path)
    assert [record["attempt"] for record in attempts.attempts(tmp_path)] == list(range(1, 12))


def write_run(run: Path, **changes: object) -> None:
    now = time.time()
    begin(run)
    record = json.loads((run / "environment/attempt_1.json").read_text()) | {"started": now - 100}
    launch.write_json(run / "environment/attempt_1.json", record)
    finish_checkpoint(run, 40)
    # Steps 41 to 50 were done twice: only one of the two counts.
    lines = [{"step": s, "loss": 3.0, "seconds": 1.0, "time": now} for s in [*range(1, 51), *range(41, 81)]]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "log.jsonl").write_text(text + '{"step": 80, "held_out_loss": 3.1}\n{"step": 81, "lo')
    content = {"state": "running", "reason": None, "step": 80, "total_steps": 200, "tokens": 1234567, "ranks": 4}
    content |= {"loss": 3.0, "tokens_per_second": 1000.0, "eta_seconds": 120.0, "updated": now, **changes}
    launch.write_json(run / "status.json", content)


def run_status(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    status.add_arguments(parser)
    return status.main(parser.parse_args(arguments))


def test_status_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a")
    assert run_status(str(tmp_path / "a")) == 0
    told = capsys.readouterr().out
    for part in (
        "state        running",
        "attempt      1, 4 ranks",
        "step         80 of 200",
        "tokens       1,234,567",
        "ETA          0:02:00",
        "checkpoint   step 40",
        "effective    80.0% of",
    ):
        assert part in told, told


@pytest.mark.parametrize("seconds", [1e299, -1e299])
def test_a_time_beyond_the_calendar_is_none(seconds: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", eta_seconds=seconds)
    assert run_status(str(tmp_path / "a")) == 0
    assert "ETA          -" in capsys.readouterr().out


def test_a_run_started_by_hand_began_with_its_first_step(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 3.0, "seconds": 2.0, "time": 1000.0 + 2 * step} for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    launch.write_json(tmp_path / "status.json", {"state": "stopped", "updated": 1012.0})
    standing = status.Standing.of(tmp_path)
    assert (standing.started, standing.effective, standing.num_attempts) == (1000.0, 0.5, 1)


def test_status_names_the_rank_of_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", state="failed", reason="loss nan", rank=3, node="dgx07")
    run_status(str(tmp_path / "a"))
    assert "last word    loss nan\n             rank 3 on dgx07" in capsys.readouterr().out


def test_a_run_that_says_nothing_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs/a", updated=time.time() - 3600)
    write_run(tmp_path / "runs/b", state="completed", reason="all 200 steps are done")
    assert run_status("--runs", str(tmp_path / "runs")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["a", "silent", "80/200"]
    assert lines[2].split()[:3] == ["b", "completed", "80/200"] and lines[2].endswith("all 200 steps are done")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"state": 3}',
        b'{"state": "running"}',
        b'{"state": "running", "updated": 1e299}',
        b'{"state": "running", "updated": 1, "step": "x"}',
        b'{"state": "running", "updated": 1, "step": NaN}',
    ],
)
def test_a_damaged_status_is_said_and_the_other_runs_are_told(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        write_run(tmp_path / "runs" / name)
    (tmp_path / "runs/a/status.json").write_bytes(content)
    assert run_status(str(tmp_path / "runs/a")) == 2
    assert "status.json: damaged" in capsys.readouterr().err
    assert run_status("--runs", str(tmp_path / "runs")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["a", "damaged"] and lines[2].split()[:2] == ["b", "running"]


def test_a_run_that_cannot_be_read_is_said_and_the_other_runs_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        write_run(tmp_path / "runs" / name)
    log = tmp_path / "runs/a/log.jsonl"
    log.unlink()
    os.mkfifo(log)
    assert run_status("--runs", str(tmp_path / "runs")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{'a':<28} unreadable  {log}: Is not a plain file"
    assert lines[2].split()[:2] == ["b", "running"]


def test_a_damaged_line_of_the_log_counts_for_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a")
    with (tmp_path / "a/log.jsonl").open("ab") as log:
        log.write(b'"loss": 3.0}\n\xff\0\n')
        log.write(b'{"step": 2, "loss": 3.0, "seconds": null}\n{"step": 3, "loss": 3.0, "seconds": 1, "time": "t"}\n')
        log.write(b'{"step": 4, "loss": "3.0"}\n[1]\n')
    assert run_status(str(tmp_path / "a")) == 0
    assert "effective    80.0% of" in capsys.readouterr().out


def test_a_damaged_pointer_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a")
    latest = tmp_path / "a/checkpoints/latest"
    latest.write_bytes(b"\xff\xfe")
    assert run_status(str(tmp_path / "a")) == 0
    latest.unlink()
    latest.symlink_to(tmp_path)  # to a folder, as other frameworks have it
    assert run_status(str(tmp_path / "a")) == 0
    assert capsys.readouterr().out.count("checkpoint   none yet") == 2


def test_a_run_that_was_stopped_before_it_began_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert begin(tmp_path) == "go"
    (tmp_path / "STOP").touch()
    assert attempts.main(["end", str(tmp_path), "--series", "job-1", "--limit", "3"]) == 0
    assert run_status(str(tmp_path)) == 0
    assert "state        stopped" in capsys.readouterr().out


def test_no_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_status(str(tmp_path)) == 2
    assert run_status("--runs", str(tmp_path)) == 2
    assert "no runs" in capsys.readouterr().err
