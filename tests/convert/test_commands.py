"""`export` and `import` as they are typed, through a real checkpoint."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_tools.files.durable import LOCK_NAME, FolderBusy, folder_lock, new_folder
from data_tools.files.errors import DataError
from megatron_patch.__main__ import main
from megatron_patch.convert.export import export
from megatron_patch.convert.onnx_folder import write_onnx
from megatron_patch.convert.source import ConvertError
from megatron_patch.train.checkpoint import write
from megatron_patch.train.checkpoint.format import StoredFile
from megatron_patch.train.checkpoint.reader import open_checkpoint
from megatron_patch.train.checkpoint.write import partial_folder, write_weights
from tests.convert.samples import RECIPES, MemoryWeights, small_recipe


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
    assert "99.00" not in card


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
    provenance = hf / "provenance.json"
    whole = json.loads(provenance.read_text())
    for content, words in (
        ("{", "damaged"),
        ("[" * 100_000, "damaged (nested without end)"),
        (json.dumps({**whole, "data_digest": json.loads("[" * 70 + "]" * 70)}), "damaged (nested more than 64 deep)"),
        (json.dumps({**whole, "step": 10**400}), "damaged (step is 1000000000"),
        (json.dumps({**whole, "samples": "3"}), "damaged (samples is 3, not a whole number"),
        (json.dumps({**whole, "tokens": True}), "damaged (tokens is True"),
        (json.dumps({**whole, "data_digest": 7}), "damaged (data_digest is 7, not a text of hexadecimal digits"),
        (json.dumps({**whole, "data_digest": "\ud800"}), "damaged (data_digest is '\\ud800', not"),
        (json.dumps({**whole, "data_digest": "a\n"}), "damaged (data_digest is 'a\\n', not"),
        ("null", "damaged (not an object)"),
        (" " * (1 << 20) + "{}", "damaged (more than 1,048,576 bytes)"),
    ):
        provenance.write_text(content)
        assert main(["import", str(hf), str(tmp_path / "back")]) == 2
        assert f"{provenance}: {words}" in capsys.readouterr().err
    provenance.unlink()
    os.mkfifo(provenance)
    assert main(["import", str(hf), str(tmp_path / "back")]) == 2
    assert f"{provenance}: damaged (Is not a plain file)" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_one_import_at_a_time_writes_a_checkpoint(weights: MemoryWeights, tmp_path: Path) -> None:
    """The second of two finds the first at work, or its checkpoint: never a folder that both write."""
    partial = partial_folder(tmp_path / "one")
    with folder_lock(partial):
        (partial / "rank_00000.safetensors").write_bytes(b"of another")
        with pytest.raises(FolderBusy, match="wait for it to end"):
            write_weights(weights, tmp_path / "one")
    write_weights(weights, tmp_path / "one")  # what one that was killed left is swept
    with (
        open_checkpoint(tmp_path / "one"),
        pytest.raises(DataError, match=r"one: exists\n  remedy: choose a new folder"),
    ):
        write_weights(weights, tmp_path / "one")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one"]
    assert not (tmp_path / "one" / LOCK_NAME).exists()


@pytest.mark.parametrize("form", ["import", "expanded", "onnx"])
def test_what_came_meanwhile_stays(form: str, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import and an export of one name hold folders of their own; the later one leaves the earlier one alone."""
    final = tmp_path / "final"
    real, weights = write.write_file, MemoryWeights(small_recipe())

    def put_another() -> None:
        final.mkdir(exist_ok=True)
        (final / "of another").touch()

    class Slow(MemoryWeights):
        def tensor(self, name: str) -> torch.Tensor:
            put_another()
            return super().tensor(name)

    def slowly(path: Path, tensors: Mapping[str, torch.Tensor]) -> StoredFile:
        put_another()
        return real(path, tensors)

    monkeypatch.setattr(write, "write_file", slowly)
    with pytest.raises(
        DataError, match=r"final: something else was put there meanwhile\n  remedy: choose a new folder"
    ):
        if form == "import":
            write_weights(weights, final)
        elif form == "onnx":
            write_onnx(Slow(small_recipe()), final, tokenizer)
        else:
            export(Slow(small_recipe()), final, "expanded", tokenizer)
    assert [p.name for p in tmp_path.rglob("*")] == ["final", "of another"]


def test_a_lock_that_moved_away_with_its_folder_is_nobodys(tmp_path: Path) -> None:
    """A second process that opened the lock before the first renamed its folder is given it only after."""
    partial, final = tmp_path / "partial", tmp_path / "final"
    with new_folder(final, partial), (partial / LOCK_NAME).open("a") as opened_before:
        partial.rename(final)
        with pytest.raises(BlockingIOError):
            fcntl.flock(opened_before, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with folder_lock(partial):  # a third finds a folder of its own, and that the final one is there
            pass
    with pytest.raises(DataError, match="exists"), new_folder(final, partial):
        pass


@pytest.mark.parametrize("name", ["ffn.linear_fc1.weight", "output_layer.weight"])
def test_weights_that_are_not_finite_are_not_exported(
    name: str, weights: MemoryWeights, tokenizer: Path, tmp_path: Path
) -> None:
    broken = weights.whole[name].clone()
    broken.view(-1)[5] = float("inf")
    weights.changed[name] = broken
    with pytest.raises(ConvertError, match=f"{name}: holds values that are not finite; .* before step 2,133"):
        export(weights, tmp_path / "hf", "expanded", tokenizer)
    assert not list(tmp_path.iterdir())
