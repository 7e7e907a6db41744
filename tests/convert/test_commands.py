"""`export` and `import` as they are typed, through a real checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_patch.__main__ import main
from megatron_patch.train.checkpoint.reader import open_checkpoint
from megatron_patch.train.checkpoint.write import write_weights
from tests.convert.samples import RECIPES, MemoryWeights


@pytest.mark.parametrize("form", ["expanded", "shared"])
def test_checkpoint_to_folder_and_back(
    form: str, weights: MemoryWeights, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_weights(weights, tmp_path / "one")
    folder = str(tmp_path / "hf")
    assert main(["export", str(tmp_path / "one"), folder, "--form", form, "--tokenizer", str(tokenizer)]) == 0
    assert main(["import", folder, str(tmp_path / "two")]) == 0
    with open_checkpoint(tmp_path / "one") as one, open_checkpoint(tmp_path / "two") as two:
        assert two.recipe == one.recipe
        assert (two.step, two.samples, two.tokens, two.data_digest) == (2133, 1706400, 3494707200, "da7a")
        assert all(torch.equal(one.tensor(name), two.tensor(name)) for name in one.names())
    again = str(tmp_path / "again")
    assert main(["export", str(tmp_path / "two"), again, "--form", form, "--tokenizer", str(tokenizer)]) == 0
    first, second = (load_file(Path(f) / "model.safetensors") for f in (folder, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    assert main(["export", str(tmp_path / "one"), folder, "--form", form, "--tokenizer", str(tokenizer)]) == 2
    assert "exists; choose a new folder" in capsys.readouterr().err
    recipe = ["--recipe", str(RECIPES / "mobillama_05b.yaml")]
    assert main(["import", str(tmp_path / "one"), str(tmp_path / "three"), *recipe]) == 2
    assert "no config.json" in capsys.readouterr().err
    next((tmp_path / "one").glob("*.safetensors")).unlink()
    assert main(["export", str(tmp_path / "one"), again, "--form", form]) == 2
    assert "missing" in capsys.readouterr().err


def test_the_card_has_the_scores_of_its_checkpoint(
    weights: MemoryWeights, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_weights(weights, Path("one"))
    with open_checkpoint(Path("one")) as checkpoint:
        digest = checkpoint.digest
    for name, of, value in (("a", digest, 42.125), ("b", "other", 99.0)):
        score = {"value": value, "stderr": 0.25, "stock": None}
        content = {
            "model": "m", "tokens": 1, "digest": of, "settings": {"limit": None}, "lm_eval": "0.4.13",
            "scores": {"piqa": score}, "average": None,
        }  # fmt: skip
        Path("evaluations", name).mkdir(parents=True)
        Path("evaluations", name, "scores.json").write_text(json.dumps(content))
    assert main(["export", "one", "hf", "--form", "shared", "--tokenizer", str(tokenizer)]) == 0
    card = Path("hf/README.md").read_text()
    assert "| piqa | 42.12 ± 0.25 |" in card
    assert "99" not in card


def test_what_is_refused_leaves_nothing_and_is_named(
    weights: MemoryWeights, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, hf = tmp_path / "run", tmp_path / "hf"
    write_weights(weights, run / "checkpoints/ckpt_000")
    form = ["--form", "expanded", "--tokenizer"]
    (tmp_path / "odd.json").write_text("{")
    assert main(["export", str(run / "checkpoints/ckpt_000"), str(hf), *form, str(tmp_path / "odd.json")]) == 2
    assert not list(tmp_path.glob("hf*"))
    assert main(["export", str(run), str(hf), *form, str(tokenizer)]) == 2
    assert "a run; name one of the checkpoints in" in capsys.readouterr().err
    assert main(["export", str(run / "checkpoints/ckpt_000"), str(hf), *form, str(tokenizer)]) == 0
    (hf / "provenance.json").write_text("{")
    assert main(["import", str(hf), str(tmp_path / "back")]) == 2
    assert f"{hf / 'provenance.json'}: damaged" in capsys.readouterr().err
