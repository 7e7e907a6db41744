"""`plan` as it is typed: what it prints, refuses and writes."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import time
from pathlib import Path

import pytest

from megatron_patch.__main__ import main
from megatron_patch.plan import command as plan
from tests.train.job import write_data_set


def plan_of(*arguments: str) -> tuple[int, str, str]:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = plan.main(parser.parse_intermixed_args(arguments))
    return code, out.getvalue(), err.getvalue()


def test_a_run_is_as_long_as_its_own_data_set(tmp_path: Path) -> None:
    """3 segments of 200 rows give 3 batches of 64 each, 3 times; of conversations not built nobody knows."""
    chat = ("recipes/mobillama_05b_chat.yaml", f"data.folder={tmp_path / 'data'}", "--nodes", "1")
    code, _, told = plan_of(*chat)
    assert code == 2 and "holds no conversations yet" in told and "run.steps" in told
    assert "2,500 steps, 327.7M tokens\n" in plan_of(*chat, "run.steps=2500")[1]
    write_data_set(tmp_path / "data")
    code, text, _ = plan_of(*chat)
    assert code == 0 and "27 steps, 3.5M tokens: 3 segments of 200 rows, in 3 epochs\n" in text
    assert re.search(r"run +0\.0\d+ hours", text) and "milestones          9, " in text
    code, _, told = plan_of(*chat, "batch.global_batch_size=256")
    assert code == 2 and "more than the 200 rows" in told


def test_plan_of_the_published_run() -> None:
    code, text, _ = plan_of("recipes/mobillama_05b.yaml", "--nodes", "20", "--gpus", "a100-80g-2-ports")
    assert code == 0
    for part in (
        "534,865,920 unique (memory, checkpoints), 1,261,529,088 applied (compute)",
        "7.73 GFLOP a token",
        "767,880 steps, 1,258.1B tokens",
        "7.5 GB each, 3 kept",  # 534,865,920 x 14 bytes
        "360, 1.1 GB each; 10 of them with the optimizer",
        "reduce-scatter of gradients, in backward over 160",
        "all-gather of weights, in forward over 160",
        "all ports of a node 47.5 GB/s",
    ):
        assert part in text, part
    numbers = {
        name: float(found[1].replace(",", ""))
        for name, pattern in {
            "seconds": r"step +([\d.]+) s",
            "rate": r"bf16: ([\d,]+) tokens/s a GPU",
            "days": r"run +([\d.]+) days",
            "failures": r"failures +([\d.]+)",
            "waited": r"waited for +([\d.]+) s",
            "hidden": r"hidden +([\d.]+) s",
        }.items()
        if (found := re.search(pattern, text))
    }
    assert numbers["rate"] == pytest.approx(800 * 2048 / 160 / numbers["seconds"], rel=0.01)
    assert numbers["days"] == pytest.approx(767_880 * numbers["seconds"] / 86400, rel=0.02)
    assert numbers["failures"] == pytest.approx(numbers["days"] * 24 * 160 / (7.9 * 1024), rel=0.05)
    on_the_wire = sum(float(seconds) for seconds in re.findall(r"over 160 +([\d.]+)$", text, re.MULTILINE))
    # The sum of the norm is waited for beside them.
    assert numbers["waited"] + numbers["hidden"] == pytest.approx(on_the_wire, abs=0.003)


def test_nineteen_nodes_take_padding_into_account() -> None:
    text = plan_of("recipes/mobillama_05b.yaml", "--nodes", "19")[1]
    assert "2 micro-batches of 5 a rank, 47.4% of them padding" in text
    _, text, _ = plan_of("recipes/mobillama_05b.yaml", "--nodes", "19", "batch.micro_batch_size=3")
    assert "2 micro-batches of 3 a rank, 12.3% of them padding" in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--gpus", "a100-40g", "batch.micro_batch_size=20"], "refused: stage 0 needs 6.*lower batch.micro_batch_size"),
        (["--nodes", "3", "parallel.pipeline=5"], r"chunks"),
        (["--nodes", "5", "parallel.pipeline=11"], r"40 GPUs / .* = 3.63636: use a number of nodes that divides"),
        (["batch.global_batch_size=1706977"], "1706977 is more than the 1706976 rows of a segment"),
        (["batch.global_batch_size=4000000000000000000"], "there is no whole batch; lower it"),
        (["parallel.tensor=16"], r"a tensor group would span two nodes"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_arithmetic(arguments: list[str], reason: str) -> None:
    code, _, error = plan_of("recipes/mobillama_05b.yaml", *arguments)
    assert code == 2
    assert re.search(reason, error, re.DOTALL), error


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nodes", "0"],
        ["--nodes", "-3"],
        ["--nodes", str(2**63)],
        ["--mfu", "1e-320"],
        ["--mfu", "0"],
        ["--mfu", "45"],
        ["--mfu", "nan"],
        ["--restart-minutes", "-1"],
    ],
)
def test_numbers_without_a_meaning_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    with pytest.raises(SystemExit) as ended:
        parser.parse_intermixed_args(["recipes/mobillama_05b.yaml", *arguments])
    assert ended.value.code == 2
    assert f"argument {arguments[0]}: {arguments[1]} is given" in capsys.readouterr().err


def test_the_papers_models_side_by_side() -> None:
    code, text, _ = plan_of()
    assert code == 0
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines()[2:7]}
    assert rows["baseline2"][1:3] == ["542,148,608", "0.52B"]
    assert rows["large_base"][4] == rows["mobillama_05b"][4] == "7.73"


def test_scale_draws_the_curve_and_names_its_efficiency(tmp_path: Path) -> None:
    image = tmp_path / "scaling.svg"
    code, text, error = plan_of(
        "recipes/mobillama_05b.yaml", "--gpus", "a100-80g-2-ports", "--scale", "1,2,20,40", "--output", str(image)
    )
    assert code == 0, error
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| \d", line)]
    assert [row[0] for row in rows] == ["1", "2", "20", "40"]
    efficiency = [float(row[8].rstrip("%")) for row in rows]
    assert efficiency[0] == 100 and efficiency[2] >= 97  # the goal for the paper's nodes
    for row, share in zip(rows, efficiency, strict=True):
        a_gpu = float(row[7].replace(",", ""))
        assert a_gpu == pytest.approx(float(row[6].replace(",", "")) / int(row[1]), rel=1e-3)
        assert share == pytest.approx(100 * a_gpu / float(rows[0][7].replace(",", "")), abs=0.06)
    assert rows[3][2:4] == ["1 x 3", "16.7%"]  # 320 ranks have 2.5 rows each
    assert "efficiency" in text and "<!-- GPUs -->" in image.read_text()
    assert plan_of("recipes/mobillama_05b.yaml", "--scale", "1", "--output", str(tmp_path / "x.none"))[0] == 2


def test_energy_is_power_times_time_times_the_site() -> None:
    _, text, _ = plan_of(
        "recipes/mobillama_05b.yaml", "--gpus", "h100", "--pue", "1.5", "--grid", "0.1", "--utilisation", "0.5"
    )
    hours = float(re.search(r"([\d.]+)K GPU hours", text)[1]) * 1e3  # type: ignore[index]
    kwh, carbon = (float(n.replace(",", "")) for n in re.search(r"([\d,.]+) kWh, ([\d,.]+) kg CO2e", text).groups())  # type: ignore[union-attr]
    assert kwh == pytest.approx(hours * 0.7 * 0.5 * 1.5, rel=0.02)
    assert carbon == pytest.approx(kwh * 0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "missing or damaged; name the --folder of a `check`"),
        ("[1]", "missing or damaged"),
        ('{"ranks": 0, "nodes": 0, "gemm": null, "copy": null, "all_reduce": {}}', "holds no rates"),
        ('{"ranks": 2, "nodes": 1, "gemm": 1e12, "copy": 1e9, "all_reduce": {"8": -1}}', "holds no rates"),
        ('{"ranks": 2, "nodes": 1, "gemm": 1e12, "copy": 1e9, "all_reduce": {"x": 1}}', "holds no rates"),
        ('{"ranks": 2, "nodes": 1, "gemm": 1e12, "copy": 1e9, "disk": 0, "all_reduce": {}}', "holds no rates"),
    ],
)
def test_what_was_not_measured_is_refused(content: str | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "measured.json").write_text(content)
    code, _, error = plan_of("recipes/mobillama_05b.yaml", "--measured", str(tmp_path))
    assert code == 2 and f"{tmp_path}/measured.json" in error and reason in error
    for half in (["--ports", "2"], ["--port-gbits", "200"], ["--ports", "2", "--port-gbits", "0"]):
        assert plan_of("recipes/mobillama_05b.yaml", *half)[0] == 2


def test_a_save_and_the_rows_are_held_against_the_measured_disk(tmp_path: Path) -> None:
    found = {"ranks": 8, "nodes": 1, "gemm": 271.2e12, "copy": 1.84e12, "all_reduce": {}, "disk": 1e9}
    arguments = ("recipes/mobillama_05b.yaml", "--measured", str(tmp_path), "checkpoint.interval_minutes=0")

    def planned(interval: int, **more: float) -> tuple[str, str]:
        (tmp_path / "measured.json").write_text(json.dumps({**found, **more}))
        code, text, told = plan_of(*arguments, f"checkpoint.interval_steps={interval}")
        assert code == 0
        return text, told

    text, told = planned(1000)
    step = float(re.search(r"step +([\d.]+) s", text)[1])  # type: ignore[index]
    assert f"1 GB/s written by a node while all do: a save is durable after {534_865_920 * 14 / 20 / 1e9:.1f} s" in text
    assert float(re.search(r"s of every ([\d,]+), beside", text)[1].replace(",", "")) == pytest.approx(  # type: ignore[index]
        1000 * step, rel=0.01
    )
    needed = float(re.search(r"needs rows at ([\d.]+) MB/s", text)[1])  # type: ignore[index]
    assert needed == pytest.approx(800 * 2049 * 2 / step / 20 / 1e6, rel=0.02)
    assert not told
    text, told = planned(10, disk=40e6, disk_read=1e4)
    assert "warning: a save takes 9 s and the next one begins after" in told
    assert f"warning: a node needs rows at {needed:.2f} MB/s and reads 0.01" in told
    assert "raise checkpoint.interval_steps" in told and "stage the data" in told
    found.pop("disk")
    assert "written by a node" not in planned(1000)[0]


def test_table_1_is_drawn_whole(tmp_path: Path) -> None:
    image = tmp_path / "table_1.svg"
    assert plan_of("--gpus", "a100-80g-2-ports", "--output", str(image))[0] == 0
    words = image.read_text()
    for word in ("Parameters (B)", "GPU hours (K)", "Memory a GPU (GB)", "Days", "mobillama_08b", "26.6", "46.1"):
        assert f"<!-- {word} -->" in words


def test_a_run_is_held_against_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    on = ["--gpus", "h100", "--nodes", "1", "--gpus-per-node", "4"]
    code, text, _ = plan_of("recipes/demo.yaml", f"run.folder={run}", "--save", *on)
    assert code == 0
    planned = json.loads((run / "plan.json").read_text())
    assert f"{planned['tokens_per_second']:,.0f} in all" in text and planned["ranks"] == 4
    rate = planned["tokens_per_second"] / 4
    status = {"state": "running", "updated": time.time(), "ranks": 4, "loss": 1.0, "tokens_per_second": rate}
    (run / "status.json").write_text(json.dumps(status))
    assert main(["status", str(run)]) == 0
    assert re.search(r"^plan +[\d,]+ tokens/s on 1 node of 4 h100; 25.0% of it reached$", capsys.readouterr().out, re.M)
    (run / "status.json").write_text(json.dumps({**status, "ranks": 8}))
    assert main(["status", str(run)]) == 0
    assert "made for 4 ranks, not 8; plan again with --save" in capsys.readouterr().out
    (run / "plan.json").write_text("{")
    assert main(["status", str(run)]) == 0
    assert "plan  " not in capsys.readouterr().out
