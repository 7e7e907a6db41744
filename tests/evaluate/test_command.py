"""`eval` as it is typed, in processes of its own: against the stock harness, killed, on two ranks, without its data."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.__main__ import main
from megatron_patch.convert.export import export
from megatron_patch.evaluate.data import loader
from megatron_patch.evaluate.suite import BENCHMARKS, BY_NAME
from megatron_patch.results import read_scores
from megatron_patch.train.checkpoint.write import write_weights
from tests.convert.samples import MemoryWeights, small_recipe
from tests.evaluate.hub import Downloaded, Hub
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
FEW = "--benchmarks=hellaswag,truthfulqa,piqa,race,siqa,winogrande"


def command(*arguments: str | Path) -> list[str]:
    return ["-m", "megatron_patch", "eval", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def evaluate_command(*arguments: str | Path, ranks: int = 1) -> tuple[int, str, str]:
    """Runs the command on forked ranks; exit code, output and messages of the first."""
    return run_ranks(ranks, _captured, ["eval", *map(str, arguments)])[0]  # type: ignore[no-any-return]


def _captured(arguments: list[str]) -> tuple[int, str, str]:
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        code = main(arguments)
    return code, out.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def weights() -> MemoryWeights:
    return MemoryWeights(small_recipe("model.sequence_length=2048"))


@pytest.fixture(scope="module")
def checkpoint(weights: MemoryWeights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "ckpt_000"
    write_weights(weights, folder)
    return folder


@pytest.fixture(scope="module")
def ours(checkpoint: Path, data: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """scores.json of the whole suite on the checkpoint, by the command."""
    output = tmp_path_factory.mktemp("ours")
    code, _, errors = evaluate_command(checkpoint, "--data", data, "--tokenizer", tokenizer, "--output", output)
    assert code == 0, errors
    (scores,) = read_scores(output)
    return scores


def test_scores_are_the_stock_harness_on_the_expanded_export(
    ours: dict[str, Any], weights: MemoryWeights, downloaded: Downloaded, tokenizer: Path, tmp_path: Path
) -> None:
    """`simple_evaluate` with the harness's own model, tasks and data sets, on what `export` wrote."""
    export(weights, tmp_path / "hf", "expanded", tokenizer)
    process = downloaded.hub.start(downloaded.home, "tests.evaluate.stock", tmp_path / "hf", tmp_path / "stock.json")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    answer = json.loads((tmp_path / "stock.json").read_text())
    results = answer["results"]
    assert {name: answer["prompts"][name] for name in ours["tasks"]} == {
        name: task["prompts_digest"] for name, task in ours["tasks"].items()
    }  # every question, shots included, to the last character

    def stock(task: str, metric: str) -> str:
        return f"{100 * results[task][f'{metric},none']:.2f}"  # as the harness prints it: four digits of a share

    for benchmark in BENCHMARKS:
        mean = sum(results[t.name][f"{benchmark.metric},none"] for t in benchmark.tasks) / len(benchmark.tasks)
        assert f"{ours['scores'][benchmark.name]['value']:.2f}" == f"{100 * mean:.2f}"
        # Shares of hits are the same to the last bit but for the order of sums; truthfulqa is a mean of probabilities.
        assert ours["scores"][benchmark.name]["value"] == pytest.approx(
            100 * mean, rel=1e-5 if benchmark.name == "truthfulqa" else 1e-12
        )
    for name, task, metric in (
        ("mmlu", "mmlu", "acc"), ("crows_pairs", "crows_pairs_english", "pct_stereotype"), ("race", "race", "acc"),
        ("siqa", "social_iqa", "acc"),
    ):  # fmt: skip
        assert f"{ours['scores'][name]['stock']:.2f}" == stock(task, metric)
    for name, task in (("hellaswag", "hellaswag"), ("winogrande", "winogrande"), ("arc_challenge", "arc_challenge")):
        error = results[task][f"{BY_NAME[name].metric}_stderr,none"]
        assert ours["scores"][name]["stderr"] == pytest.approx(100 * error, rel=1e-9)
    assert ours["digest"]
    assert ours["tokens"] == weights.tokens


def test_a_model_by_its_hub_name_and_a_folder_of_checkpoints(
    ours: dict[str, Any], checkpoint: Path, weights: MemoryWeights, repositories: dict[str, dict[str, bytes]],
    data: Path, tokenizer: Path, tmp_path: Path,
) -> None:  # fmt: skip
    export(weights, tmp_path / "hf", "expanded", tokenizer)
    files = {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()}
    few = ("--data", data, "--benchmarks", "piqa,truthfulqa", "--output", tmp_path / "out")
    with Hub({"models/someone/small": files}) as hub:
        code, errors = hub.evaluate(tmp_path / "home", "someone/small@main", *few)
        assert code == 0, errors
        assert "model.safetensors" in "".join(hub.fetched)
        code, errors = hub.evaluate(tmp_path / "home", "someone/other", *few)
        assert (code, "someone/other: no such folder, and the hub" in errors) == (2, True), errors

    folder = tmp_path / "several"
    shutil.copytree(checkpoint, folder / "ckpt_000")
    write_weights(MemoryWeights(weights.recipe, seed=4, step=4266, tokens=2 * weights.tokens), folder / "final")
    for name in ("step_00004266", "ckpt_000.broken"):
        shutil.copytree(checkpoint, folder / name)
    (folder / "ckpt_001").mkdir()  # being written
    code, table, errors = evaluate_command(folder, *few, "--tokenizer", tokenizer)
    assert code == 0, errors
    found = {s["model"]: s for s in read_scores(tmp_path / "out")}
    assert list(found) == ["mobillama_05b--ckpt_000", "mobillama_05b--final", "someone--small@main"]
    for model in ("mobillama_05b--ckpt_000", "someone--small@main"):
        for name, score in found[model]["scores"].items():
            assert score["value"] == pytest.approx(ours["scores"][name]["value"], rel=1e-5)
    assert "mobillama_05b--final | ours | 6.989B" in table
    assert "ckpt_000 | ours" not in table  # the last of the run stands for it
    assert "--all" in table


def test_hugging_face_folder_scores_the_same(
    ours: dict[str, Any],
    weights: MemoryWeights,
    data: Path,
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    """Read by transformers in either form, and read into our model under a recipe."""
    for form, extra in (("shared", ["--trust-remote-code"]), ("expanded", ["--recipe", tmp_path / "recipe.yaml"])):
        export(weights, tmp_path / form, form, tokenizer)  # type: ignore[arg-type]
        (tmp_path / "recipe.yaml").write_text(weights.recipe.to_yaml())
        output = tmp_path / f"out_{form}"
        code, _, errors = evaluate_command(tmp_path / form, "--data", data, "--output", output, FEW, *extra)
        assert code == 0, errors
        (scores,) = read_scores(tmp_path / f"out_{form}")
        assert scores["tokens"] is None
        for name, score in scores["scores"].items():
            assert score["value"] == pytest.approx(ours["scores"][name]["value"], rel=1e-5)


def test_two_ranks_score_as_one(
    ours: dict[str, Any], checkpoint: Path, data: Path, tokenizer: Path, tmp_path: Path
) -> None:
    arguments = (checkpoint, "--data", data, "--tokenizer", tokenizer, "--output", tmp_path / "out", FEW)
    code, _, errors = evaluate_command(*arguments, ranks=2)
    assert code == 0, errors
    (scores,) = read_scores(tmp_path / "out")
    for name, score in scores["scores"].items():
        assert score["value"] == pytest.approx(ours["scores"][name]["value"], rel=1e-5)
    digests = {name: task["prompts_digest"] for name, task in scores["tasks"].items()}
    assert digests == {name: ours["tasks"][name]["prompts_digest"] for name in digests}


def test_killed_in_the_middle_repeats_nothing(
    ours: dict[str, Any], checkpoint: Path, data: Path, tokenizer: Path, tmp_path: Path
) -> None:
    arguments = (checkpoint, "--data", data, "--tokenizer", tokenizer, "--output", tmp_path / "out")
    process = subprocess.Popen(
        [sys.executable, *command(*arguments)],
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:  # killed while the next tasks run
        if "(20/" in line:
            process.kill()
            break
    process.wait()
    process.stderr.close()
    finished = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in tmp_path.glob("out/*/tasks/*.json")}
    total = sum(len(b.all_tasks) for b in BENCHMARKS)
    assert 20 <= len(finished) < total
    assert not list(tmp_path.glob("out/*/scores.json"))

    code, _, errors = evaluate_command(*arguments)
    assert (code, f"(1/{total - len(finished)})" in errors) == (0, True), errors
    after = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in tmp_path.glob("out/*/tasks/*.json")}
    assert len(after) == total
    assert {name: after[name] for name in finished} == finished
    (scores,) = read_scores(tmp_path / "out")
    assert scores == ours

    (damaged,) = tmp_path.glob("out/*/tasks/piqa.json")
    content = damaged.read_bytes()
    damaged.write_bytes(content.replace(b'"documents": ', b'"documents": 1'))
    code, table, errors = evaluate_command(*arguments)
    assert (code, errors.count("done ("), f"{damaged}: digest: the content does not match" in errors) == (0, 1, True), (
        errors
    )
    assert read_scores(tmp_path / "out") == [ours]
    assert "| mobillama_05b--ckpt_000 | ours | 3.495B |" in table


def test_other_settings_do_run_again(checkpoint: Path, data: Path, tokenizer: Path, tmp_path: Path) -> None:
    arguments = (checkpoint, "--data", data, "--tokenizer", tokenizer, "--output", tmp_path, "--benchmarks=piqa")
    for limit in ("2", "3"):
        code, table, errors = evaluate_command(*arguments, "--limit", limit)
        assert (code, "piqa done (1/1)" in errors) == (0, True), errors
        assert f"ours, {limit} documents a task" in table
    (scores,) = read_scores(tmp_path)
    assert scores["tasks"]["piqa"]["documents"] == 3
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer.read_bytes() + b"\x1a\x00")  # an empty field: other bytes, the same pieces
    code, _, errors = evaluate_command(*[other if a == tokenizer else a for a in arguments], "--limit", "3")
    assert (code, "piqa done (1/1)" in errors) == (0, True), errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["CHECKPOINT", "--data", "absent"], "absent: data set Rowan/hellaswag/default/train is missing; fetch it with "
         "`python -m megatron_patch eval --download absent`"),
        (["CHECKPOINT", "--benchmarks", "hellaswag,mmmlu"], "unknown mmmlu; known: hellaswag, truthfulqa"),
        (["MBZUAI/MobiLlama-05B"], "fetch it where there is a network"),
        (["--download", "fetched"], "Rowan/hellaswag: cannot be fetched"),
        (["not/a/model"], "not/a/model: no such folder"),
        (["EMPTY"], "no config.json and no finished checkpoint in it; name a model"),
        (["EMPTY", "--watch"], "--watch takes the folder of a run that has begun"),
        (["a", "b", "--watch"], "--watch watches one run"),
        (["DAMAGED", "--data", "DATA"], "damaged"),
        ([], "no model named"),
        (["CHECKPOINT", "--data", "DATA", "--tokenizer", "absent.model"], "absent.model: no such file"),
    ],
)  # fmt: skip
def test_refusals(
    arguments: list[str], message: str, checkpoint: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    shutil.copytree(checkpoint, "damaged")
    (file,) = Path("damaged").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    places = {"CHECKPOINT": checkpoint, "EMPTY": "empty", "DAMAGED": "damaged", "DATA": data}
    code, _, errors = evaluate_command(*[places.get(a, a) for a in arguments])
    assert code == 2
    assert message in errors
    assert not list(Path().glob("evaluations/*/*.json"))


def test_damaged_data_is_named(data: Path, tmp_path: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    record = manifest["baber/piqa/default/validation"]
    copy = tmp_path / record["file"]
    copy.parent.mkdir(parents=True)
    train = manifest["baber/piqa/default/train"]
    (tmp_path / train["file"]).write_bytes((data / train["file"]).read_bytes())
    content = bytearray((data / record["file"]).read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"validation\.parquet: its SHA-256 is not"):
        loader(tmp_path, BY_NAME["piqa"].tasks[0])
