"""A .pte file in ExecuTorch: the float64 model's log-probabilities and greedy tokens, one FFN in file and memory.

Left out where the extra `executorch` is not installed; a lowering takes half a minute of a core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_patch.__main__ import main
from megatron_patch.devices.forms import find_form
from megatron_patch.devices.measure import measure
from megatron_patch.devices.runtimes import RuntimeFormError
from megatron_patch.model.counts import parameters
from megatron_patch.train.checkpoint.write import write_weights
from tests.convert.samples import MemoryWeights
from tests.convert.test_export import reference_logits
from tests.devices.models import EOS_ID, NEW_TOKENS, PROMPTS, device_weights, log_probs

pytest.importorskip("executorch")
pytestmark = pytest.mark.soak
ROOT = Path(__file__).parents[2]
ROW = PROMPTS.view(1, -1)
FFN_BYTES = 3 * 64 * 16384 * 4
LAYERS = 3


@pytest.fixture(scope="module")
def large_ffn() -> MemoryWeights:
    """Beside its FFN the rest of the model is small."""
    return device_weights(f"model.num_layers={LAYERS}", "model.ffn_hidden_size=16384")


@pytest.fixture(scope="module")
def fp32(large_ffn: MemoryWeights, device_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(large_ffn, device_tokenizer, tmp_path_factory.mktemp("fp32"))


def exported(weights: MemoryWeights, tokenizer: Path, folder: Path, *words: str) -> Path:
    """As it is typed."""
    write_weights(weights, folder / "checkpoint")
    command = ["export", str(folder / "checkpoint"), str(folder / "m.pte"), "--form", "executorch", *words]
    assert main([*command, "--tokenizer", str(tokenizer)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint", "m.pte"]
    return folder / "m.pte"


def test_fp32_is_the_model_and_holds_one_ffn(fp32: Path, large_ffn: MemoryWeights) -> None:
    model = large_ffn.recipe.model
    unique = 4 * parameters(model).unique
    assert unique < fp32.stat().st_size < unique + FFN_BYTES / 8
    assert find_form(fp32).is_fp32(model)
    answer = measure(fp32, 1, True, NEW_TOKENS, PROMPTS.tolist(), ROW.tolist())
    found = torch.tensor(answer.log_probs[0])
    torch.testing.assert_close(found.double(), log_probs(large_ffn, ROW)[0], rtol=0, atol=1e-4)
    continued = torch.tensor(answer.continued)
    assert continued.shape == (8, NEW_TOKENS) and answer.eos == EOS_ID
    # Each id is the likeliest after those before it, so they are the float64 model's greedy ones.
    logits = reference_logits(large_ffn, torch.cat([PROMPTS, continued], 1))[:, PROMPTS.shape[1] - 1 : -1]
    logits[..., EOS_ID] = float("-inf")
    assert torch.equal(continued, logits.argmax(-1))


def test_one_ffn_in_memory_by_the_cache_of_packed_weights(fp32: Path) -> None:
    """`off`: as ExecuTorch's Python package comes, one copy for each use. What is not weights is the same."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    taken = {}
    for cache in ("on", "off"):
        command = [sys.executable, "-m", "benchmarks.executorch_memory", str(fp32), "--opened", cache]
        told = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, cwd=ROOT)
        taken[cache] = int(told.stdout.split()[-1])
    assert taken["off"] - taken["on"] == pytest.approx((LAYERS - 1) * FFN_BYTES, rel=0.1)


def test_8da4w_is_near(device_tokenizer: Path, tmp_path: Path) -> None:
    weights = device_weights("model.num_layers=2")
    file = exported(weights, device_tokenizer, tmp_path, "--quantize", "8da4w", "--context", "160")
    answer = measure(file, 2, False, 4, PROMPTS.tolist(), ROW.tolist())
    found = torch.tensor(answer.log_probs[0]).double()
    expected = log_probs(weights, ROW)[0]
    assert 1e-4 < (found - expected).abs().max() < 0.6
    assert abs(float(found.mean() - expected.mean())) < 0.1
    # Four bits and a scale of 32 for each group; a program of this size is mostly its graph.
    assert file.stat().st_size < find_form(file).stored(weights.recipe.model) * 2
    with pytest.raises(RuntimeFormError, match=r"m\.pte: its cache holds 160 ids, 209 are asked for; export with"):
        measure(file, 1, False, 200, [[5]], [[5, 6]])


def test_refusals(weights: MemoryWeights, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FFN rows of 48 are no whole groups of 32."""
    write_weights(weights, tmp_path / "checkpoint")
    words = ["export", str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--tokenizer", str(tokenizer), "--form"]
    (tmp_path / "torn.pte").write_bytes(b"ET12")
    for more, reason in (
        (["executorch", "--quantize", "8da4w"], "down_proj.weight have 48 weights, no whole number of groups of 32"),
        (["executorch", "--quantize", "int8"], "--form executorch has 8da4w"),
        (["executorch", "--context", "257"], "--context 257: the model was trained on rows of 256"),
        (["onnx", "--context", "20"], "--context 20: of --form executorch alone"),
    ):
        assert main([*words, *more]) == 2
        assert reason in capsys.readouterr().err
    with pytest.raises(RuntimeFormError, match=r"torn\.pte: ExecuTorch cannot open it"):
        measure(tmp_path / "torn.pte", 1, True, 4, [[5]], [[5, 6]])


def test_whole_or_absent_wherever_it_is_killed(device_tokenizer: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.devices.killed", str(tmp_path), str(device_tokenizer), "executorch"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert told.returncode == 0, told.stderr
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")] == ["executorch/out"]


def test_it_says_where_its_weights_come_from(fp32: Path) -> None:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(fp32)
    [told] = program.load_method("provenance").execute([])
    assert json.loads(told)["recipe"] == "mobillama_05b"
