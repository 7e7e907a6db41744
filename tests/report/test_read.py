"""Restarts, thinned curves, units and the comparison with the paper's Table 1."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from megatron_patch.__main__ import main
from megatron_patch.report.read import Restart, Restarts, read_run
from megatron_patch.report.series import Axes, Thinned
from megatron_patch.report.summary import History


def steps(*ends: float) -> list[dict[str, float]]:
    """Steps of a second each that ended at these times."""
    return [{"step": i, "seconds": 1.0, "time": end} for i, end in enumerate(ends, 1)]


def restarts(records: list[dict[str, float]], starts: list[float]) -> list[Restart]:
    found = Restarts(starts)
    for record in records:
        found.add(record)
    return found.found


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


def test_starts_by_hand_are_read_off_the_log() -> None:
    """A held-out loss of 60 s and a save of 5 s are no restart; 30 s without a record are."""
    records = [
        *steps(11, 12), {"step": 2, "held_out_loss": 1.0, "time": 72.0},
        *[{**s, "step": s["step"] + 2} for s in steps(73, 79, 109, 110)],
    ]  # fmt: skip
    (only,) = restarts(records, [])
    assert (only.time, only.step, only.lost) == (108.0, 4, 29.0)
    assert restarts(records, [5.0, 90.0]) == restarts(records, [90.0]) == [only]  # Slurm's launcher has recorded it


def test_real_run(run: Path, evaluations: Path) -> None:
    found = read_run(run, evaluations)
    tokens = 20 * 8 * found.recipe.model.sequence_length
    assert [tokens for _, tokens, _ in found.steps.curves["loss"].points()] == [i * tokens / 20 for i in range(1, 61)]
    assert [at for _, at, _ in found.held_out.points()] == [tokens, 2 * tokens, 3 * tokens]
    (restart,) = found.restarts
    assert restart.step in (12, 24, 36, 48)  # the newest restart checkpoint that was durable when it was killed
    assert restart.lost > 0
    assert [m["name"] for m in found.milestones] == ["ckpt_000", "ckpt_001", "ckpt_002"]
    assert len(found.scores) == 3
    assert found.mix is not None
    assert "git" in found.environment


def test_damaged_records_are_left_out(
    run: Path, evaluations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, damaged = read_run(run, evaluations), tmp_path / "run"
    shutil.copytree(run, damaged)
    lines = (damaged / "log.jsonl").read_bytes().splitlines(keepends=True)
    (damaged / "log.jsonl").write_bytes(b"".join([lines[0], b"\xff\0\n", b'{"step": 1, "loss": 5}\n', *lines[1:]]))
    table = damaged / "checkpoints/checkpoints.csv"
    table.write_text(table.read_text() + "ckpt_900,9\n")
    read = read_run(damaged, evaluations)
    assert (read.steps, read.milestones) == (whole.steps, whole.milestones) and whole.milestones
    history = History.read(damaged / "log.jsonl")
    assert (history.first, history.last) == (whole.steps.first, whole.steps.last)
    assert history.loss.points() == whole.steps.curves["loss"].points()[::-1]
    assert f"{damaged / 'log.jsonl'}, line 2: damaged" in capsys.readouterr().err
    shutil.rmtree(damaged / "environment")
    newest = max((damaged / "checkpoints").glob("*/index.json"), key=lambda file: file.stat().st_mtime)
    newest.write_text("{")
    assert "torch" in read_run(damaged, evaluations).environment, "of the checkpoint before"


def test_a_damaged_data_set_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    data = Path(read_run(run, tmp_path).recipe.data.folder or "")
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data/manifest.json").write_text("{")
    (copy / "recipe.yaml").write_text((copy / "recipe.yaml").read_text().replace(str(data), str(tmp_path / "data")))
    assert main(["report", str(copy), "--output", str(tmp_path / "report.html")]) == 2
    assert f"refused: {tmp_path}/data/manifest.json: not JSON" in capsys.readouterr().err


def test_thin_keeps_every_peak() -> None:
    values = [1.0] * 10_000
    values[1234], values[7777], values[9999] = 9.0, -3.0, 7.0
    thinned, most = Thinned(100), 0
    for i, value in enumerate(values):
        thinned.add(float(i), 2.0 * i, value)
        most = max(most, len(thinned.points()))
        if i == 99:
            assert thinned.points() == [(float(i), 2.0 * i, 1.0) for i in range(100)], "so few are all kept"
    kept = thinned.points()
    assert most == 100 and len(kept) > 40
    assert {9.0, -3.0, 7.0} <= {value for _, _, value in kept}
    assert [time for time, _, _ in kept] == sorted(time for time, _, _ in kept)


def test_units_suit_the_run() -> None:
    assert Axes.of(0, 90_000, 3e9).time_unit == "hours"
    assert Axes.of(0, 200, 5e5).token_unit == "thousand tokens"
    assert Axes.of(100, 200, 5e6).at(160, 2e6) == {"time": 1.0, "tokens": 2.0}


def test_compare(run: Path, evaluations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained and planned beside the paper's; the planned hours and memory are those that `plan` prints."""
    arguments = [str(run), "recipes/mobillama_05b.yaml", "recipes/baseline1.yaml", "--evaluations", str(evaluations)]
    image = tmp_path / "figure_1.svg"
    assert main(["report", "--compare", *arguments, "--nodes", "10", "--mfu", "0.4", "--output", str(image)]) == 0
    text = capsys.readouterr().out
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    assert "| large-base | paper, A100 | 1.2B | 1,259.13 | 46,100.00 | 6.00 | - | 49.06 |" in text
    name, source, parameters, tokens, hours, memory, gflop, accuracy = lines["mobillama_05b"].strip("| ").split(" | ")
    assert (name, source, parameters, gflop, accuracy) == ("mobillama_05b", "planned", "534,865,920", "7.73", "-")
    assert tokens == f"{360 * 2133 * 800 * 2048 / 1e9:,.2f}"
    assert main(["plan", "recipes/mobillama_05b.yaml", "--nodes", "10", "--mfu", "0.4"]) == 0
    plan = capsys.readouterr().out
    assert f"{float(hours.replace(',', '')) / 1e3:.1f}K GPU hours" in plan
    (gib,) = re.findall(r"with reserve +([\d.]+) of", plan)
    assert float(memory) * 1e9 / 2**30 == pytest.approx(float(gib), abs=0.01)
    assert "on 10 nodes of 8 a100-80g, computing at 40% MFU" in text
    assert "| 100.00 |" in lines["baseline1"]
    assert "mobillama_05b is planned for every whole batch of the data, once: 767,880 steps." in text
    assert "baseline1 is planned for the 61,036 steps that its recipe says" in text
    assert "| completed |" in lines["demo"]
    assert lines["demo"].endswith("| 32.00 |")
    hours_of_run = lines["demo"].split(" | ")[4]
    first, last = (found := read_run(run, evaluations).steps).first, found.last
    assert float(hours_of_run) == pytest.approx((last["time"] - first["time"] + first["seconds"]) / 3600, rel=1e-3)
    words = image.read_text()
    for title in ("Parameters (B)", "Tokens (B)", "GPU hours", "Memory (GB)", "Accuracy", "demo (completed)"):
        assert f"<!-- {title} -->" in words
    assert main(["report", "--compare", *arguments, "--output", str(tmp_path / "figure_1.png")]) == 0
    assert Image.open(tmp_path / "figure_1.png").width > 1000


def test_compare_refuses_what_is_neither_run_nor_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in (
        (tmp_path / "absent", "no such run folder or recipe file; e.g."),
        (tmp_path, "no recipe.yaml in it"),
    ):
        assert main(["report", "--compare", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_numbers_that_were_not_finite_and_a_line_cut_short(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    lines = (run / "log.jsonl").read_text().splitlines()
    odd = [{**json.loads(line), "time": 4e9} for line in lines if '"step": 60' in line]  # the last step and held-out
    odd = [{k: None if k in ("loss", "grad_norm", "held_out_loss") else v for k, v in r.items()} for r in odd]
    assert len(odd) == 2
    cut = [lines[0], lines[1][:30], *lines[2:]]
    (copy / "log.jsonl").write_text("\n".join([*cut, *map(json.dumps, odd), lines[3][:20]]))
    status = json.loads((copy / "status.json").read_text())
    (copy / "status.json").write_text(json.dumps({**status, "loss": None}))
    assert main(["report", str(copy), "--evaluations", str(tmp_path / "none")]) == 0
    assert "<dt>Held-out loss</dt><dd>-</dd>" in (copy / "report.html").read_text()
    assert main(["status", str(copy)]) == 0
    assert "loss" not in capsys.readouterr().out
    history = History.read(copy / "log.jsonl")
    assert (history.last["step"], history.last["loss"], history.last_held_out) == (60, None, None)
    steps_drawn = {round(tokens / history.last["tokens"] * 60) for _, tokens, _ in history.loss.points()}
    assert steps_drawn == set(range(1, 60)) - {json.loads(lines[1])["step"]}
