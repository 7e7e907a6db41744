"""Tables 4, 5, 8 and 9 and the plot, from results as `eval` leaves them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_patch.__main__ import main
from megatron_patch.evaluate.scores import TaskResult, average, scores
from megatron_patch.evaluate.suite import BENCHMARKS
from megatron_patch.paper import TABLE_4, TABLE_5, TABLE_8, TABLE_9

NAMES = [b.name for b in BENCHMARKS]


def result(model: str, tokens: int | None, first: float, names: list[str] = NAMES) -> dict[str, Any]:
    """Scores first, first + 1, ... with standard errors 0.3 and, where the harness differs, its own score 1 lower."""
    found = {
        b.name: {"value": first + i, "stderr": 0.3, "stock": first + i - 1 if b.stock else None}
        for i, b in enumerate(BENCHMARKS)
        if b.name in names
    }
    return {
        "model": model, "digest": "0", "step": None, "tokens": tokens, "settings": {"limit": None},
        "lm_eval": "0.4.13", "scores": found, "average": {"value": first + 4, "stderr": 0.1, "stock": None},
        "tasks": {},
    }  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "evaluations"
    for content in (
        result("mobillama_05b--ckpt_000", 3_494_707_200, 30.0),
        result("mobillama_05b--ckpt_001", 6_989_414_400, 40.0),
        result("gpt-neo-125m", None, 20.0, names=["hellaswag", "truthfulqa", "mmlu", "arc_challenge"]),
    ):
        (folder / content["model"]).mkdir(parents=True)
        (folder / content["model"] / "scores.json").write_text(json.dumps(content))
    return folder


def test_the_papers_averages_follow_from_its_columns() -> None:
    """So that no figure was mistyped: every row's mean is the printed average, to its rounding."""
    for row in (*TABLE_4, *TABLE_5, *TABLE_9):
        assert row.average is not None
        assert sum(row.scores) / len(row.scores) == pytest.approx(row.average, abs=0.0101), row.model
    assert len(TABLE_4) == 13


def test_markdown(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--table", str(results)]) == 0
    text = capsys.readouterr().out
    four, five, eight, nine = text.split("\nTable ")
    assert four.startswith("Table 4")
    assert (five[0], eight[0], nine[0]) == ("5", "8", "9")
    assert [line.split(" | ")[0] for line in eight.splitlines() if line.startswith("| ")] == [
        "| Model",
        "| MobiLlama-V",
    ]
    assert (
        "| MobiLlama 0.5B | paper |  | 52.52 | 38.05 | 26.45 | 29.52 | 64.03 | 72.03 | 33.68 | 40.22 | 57.53 |" in four
    )
    assert "| 46.00 | 43.75 |" in four  # without CrowS-Pairs: facts from the paper's own columns
    ours = [line for line in four.splitlines() if line.startswith("| mobillama_05b")]
    # 40 ... 48: the mean is 44; without the fifth, 44 too. Standard error 0.3 / sqrt(9) and 0.3 / sqrt(8).
    assert ours[0].startswith("| mobillama_05b--ckpt_001 | ours | 6.989B | 40.00 ± 0.30 | 41.00 ± 0.30 |")
    assert ours[0].endswith("| 44.00 ± 0.10 | 44.00 ± 0.11 |")
    assert ours[1].split(" | ")[1] == "harness 0.4.13"
    assert [cell.strip() for cell in ours[1].split("|")[4:-1]] == [
        "",
        "",
        "41.00",
        "",
        "43.00",
        "",
        "45.00",
        "46.00",
        "",
        "",
        "",
    ]
    assert len(ours) == 2  # the run's last checkpoint alone
    assert "| gpt-neo-125m | ours |  | 20.00 ± 0.30 |" in four
    assert four.splitlines()[-1].startswith("- CrowsPairs counts stereotyped choices")
    assert "| baseline2 | paper |  | 42.15 | 38.70 | 25.73 | 26.10 | 33.17 |" in five
    assert (
        "| gpt-neo-125m | ours |  | 20.00 ± 0.30 | 21.00 ± 0.30 | 22.00 ± 0.30 | 23.00 ± 0.30 | 21.50 ± 0.15 |" in five
    )
    assert "| large-base | paper |  | 62.99 |" in nine


def test_csv_and_all_checkpoints(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--table", str(results), "--format", "csv", "--all"]) == 0
    four = capsys.readouterr().out.split("\n\n")[0].splitlines()
    rows = list(csv.DictReader(four))
    by_model = {row["Model"]: row for row in rows if row["Source"] == "ours"}
    assert by_model["mobillama_05b--ckpt_000"]["HellaSwag"] == "30.0"
    assert by_model["mobillama_05b--ckpt_000"]["HellaSwag stderr"] == "0.3"
    assert by_model["gpt-neo-125m"]["Average"] == ""
    assert float(by_model["mobillama_05b--ckpt_001"]["without CrowsPairs stderr"]) == pytest.approx(0.3 / 8**0.5)


def test_plot(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--plot", str(results), str(tmp_path / "scores.png")]) == 0
    image = Image.open(tmp_path / "scores.png")
    assert image.width > 1000
    assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50
    seeing = result(r"of $\frac$--ckpt_000", 1_000, 9.0, names=[])
    seeing |= {"average": None, "scores": {"mme": {"value": 1191.9, "stderr": None, "stock": None}}}
    (results / "seeing").mkdir()
    (results / "seeing/scores.json").write_text(json.dumps(seeing))
    assert main(["eval", "--plot", str(results), str(tmp_path / "scores.svg")]) == 0
    words = (tmp_path / "scores.svg").read_text()
    assert "<!-- billion tokens -->" in words
    assert all(f"<!-- {benchmark.column} -->" in words for benchmark in BENCHMARKS)
    assert r"<!-- of $\frac$ -->" in words, "a name that is no formula"
    assert "<!-- MME -->" in words and "<!-- GQA -->" not in words, "a panel for each benchmark that has scores"
    assert main(["eval", "--plot", str(tmp_path / "none"), str(tmp_path / "other.png")]) == 2
    assert "no scores of checkpoints to plot" in capsys.readouterr().err
    assert main(["eval", "--plot", str(results), str(tmp_path / "scores.xyz")]) == 2
    assert "Format 'xyz' is not supported" in capsys.readouterr().err
    assert not (tmp_path / "scores.xyz").exists()


def test_without_results_the_papers_tables_stand_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--table", str(tmp_path / "none")]) == 0
    said = capsys.readouterr()
    assert f"{tmp_path / 'none'}: no such folder" in said.err
    assert said.out.count("| paper |") == len((*TABLE_4, *TABLE_5, *TABLE_8, *TABLE_9)) and "| ours |" not in said.out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"model": "gp', "Unterminated"),
        ("[" * 1_000_000, "nested without end"),
        ("[]", "not an object"),
        ('{"model": "m", "tokens": 1e999, "scores": {}}', "tokens is not a number"),
        ('{"model": "m", "tokens": 1, "scores": {"piqa": {"value": "9"}}}', "the score piqa has no value"),
        (
            '{"model": "m", "tokens": 1, "scores": {"piqa": {"value": 9, "stderr": []}}}',
            "has a stderr that is no number",
        ),
        ('{"model": ["m"], "tokens": 1, "scores": {}}', "model is missing or of another type"),
    ],
)
def test_a_damaged_result_hides_no_other(
    content: str, words: str, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = results / "gpt-neo-125m" / "scores.json"
    damaged.write_text(content)
    assert main(["eval", "--table", str(results)]) == 0
    said = capsys.readouterr()
    assert f"{damaged}: not a result of `eval` (" in said.err and words in said.err
    assert "| mobillama_05b--ckpt_001 | ours |" in said.out and "gpt-neo-125m | ours" not in said.out
    assert main(["eval", "--plot", str(results), str(tmp_path / "scores.png")]) == 0


def test_scores_of_unequal_tasks() -> None:
    """The mean of MMLU's subjects is plain, the harness's is weighted; a single document has no standard error."""
    (mmlu,) = [b for b in BENCHMARKS if b.name == "mmlu"]
    results = {t.name: TaskResult({"acc": 0.25}, {"acc": 0.03}, 100) for t in mmlu.tasks}
    results["mmlu_virology"] = TaskResult({"acc": 0.82}, {"acc": 0.06}, 700)
    found = scores(results)
    assert list(found) == ["mmlu"]
    assert found["mmlu"].value == pytest.approx(100 * (56 * 0.25 + 0.82) / 57)
    assert found["mmlu"].stock == pytest.approx(100 * (5600 * 0.25 + 700 * 0.82) / 6300)
    assert found["mmlu"].stderr == pytest.approx(100 * (56 * 0.03**2 + 0.06**2) ** 0.5 / 57)
    results["mmlu_virology"] = TaskResult({"acc": 1.0}, {}, 1)
    assert scores(results)["mmlu"].stderr is None
    assert average(found, with_crows_pairs=True) is None
