"""`device` as it is typed: every form of a checkpoint in its own runtime, and what is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ctranslate2.converters import TransformersConverter

from megatron_patch.__main__ import main
from megatron_patch.devices import machine
from megatron_patch.devices.table import from_csv
from megatron_patch.train.checkpoint.write import write_weights
from tests.devices.models import device_weights

ROOT = Path(__file__).parents[2]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: the verb makes a process group, which ranks of other tests must not inherit."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, check=False)


def device(*words: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "megatron_patch", "device", *words)


def test_every_form_against_its_checkpoint(
    device_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = device_weights()
    write_weights(weights, Path("checkpoint"))
    for out, *words in (
        ("f32.gguf", "--form", "gguf"), ("q4.gguf", "--form", "gguf", "--quantize", "q4_0"), ("onnx", "--form", "onnx"),
        ("shared", "--form", "shared"), ("expanded", "--form", "expanded"),
    ):  # fmt: skip
        assert main(["export", "checkpoint", out, *words, "--tokenizer", str(device_tokenizer)]) == 0
    TransformersConverter("expanded").convert("ct2", quantization="int8")
    weights.changed["output_layer.weight"] = weights.whole["output_layer.weight"].roll(1, 0)
    write_weights(weights, Path("other"))
    forms = ["f32.gguf", "q4.gguf", "onnx", "ct2", "shared"]
    asked = [
        "--random",
        "--threads",
        "1",
        "--new-tokens",
        "12",
        "--tokens",
        "255",
        "--csv",
        "out.csv",
        "--most-loss",
        "0.3",
    ]
    told = device("checkpoint", *forms, *asked)
    assert told.returncode == 0, told.stderr
    rows = {row.form: row for row in from_csv(Path("out.csv").read_text())}
    assert list(rows) == forms and all(f"| {form} |" in told.stdout for form in forms)
    assert "Snapdragon-685" in told.stdout and "GB/s by 1 thread" in told.stdout
    applied, unique = 1000 * 64 * 2 + 4 * (4 * 64 * 64 + 2 * 64) + 64, 3 * 64 * 96
    for form, row in rows.items():
        assert row.recipe == "mobillama_05b" and row.tokens_per_second > 0 and row.roofline > 0
        assert (row.cpu_seconds > 0 and row.joules is None) or row.joules > 0
        copies = 4 if form.endswith("gguf") else 1
        assert row.bits == pytest.approx(8 * row.file_bytes / (applied + copies * unique))
        assert math.isclose(row.loss - row.checkpoint_loss, 0, abs_tol=2e-3 if row.bits > 31 else 0.1)
        assert row.same_tokens == 1 or row.bits < 31
    assert rows["onnx"].worst < 1e-4 and 1e-4 < rows["ct2"].worst < rows["q4.gguf"].worst

    Path("torn.gguf").write_bytes(b"GGUF")
    told = device("other", "torn.gguf", "onnx", "q4.gguf", *asked)  # one that does not open, others of other weights
    assert told.returncode == 1 and [row.form for row in from_csv(Path("out.csv").read_text())] == forms[2:0:-1]
    assert "not measured: torn.gguf on 1 thread(s): torn.gguf: llama.cpp cannot open it" in told.stderr
    for fault in ("onnx on 1 thread(s): fp32, but a log-probability", "onnx on 1 thread(s): fp32, but only"):
        assert f"worse than its checkpoint: {fault}" in told.stderr


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_weights(device_weights(), Path("checkpoint"))
    Path("torn.gguf").write_bytes(b"GGUF")
    Path("empty").mkdir()
    for words, reason in (
        (["checkpoint", "empty"], "empty: no .gguf or .pte file, no folder of `export`"),
        (["checkpoint", "absent.gguf"], "absent.gguf: no .gguf or .pte file"),
        (["checkpoint", "torn.gguf", "--against", "checkpoint"], "--against checkpoint: name its forms"),
        (["empty", "torn.gguf", "--random"], "empty"),
        (["checkpoint", "torn.gguf", "--data", "empty"], "empty"),
        (["checkpoint", "torn.gguf", "--random", "--new-tokens", "300"], "more than the model's 256"),
    ):
        assert main(["device", *words, "--threads", "1"]) == 2
        assert reason in capsys.readouterr().err
    # In a process that goes on afterwards: the checkpoint's own model needed a process group, which must be gone.
    words = ["device", "checkpoint", "torn.gguf", "--random", "--threads", "1"]
    script = f"from megatron_patch.__main__ import main; code = main({words})\n"
    script += "import torch.distributed as dist; raise SystemExit(code if not dist.is_initialized() else 9)"
    torn = run("-c", script)
    assert torn.returncode == 1 and not torn.stdout and "torn.gguf: llama.cpp cannot open it" in torn.stderr
    # A table that finds no room on the disk, after the measurement: printed by then, and the file is named.
    command = f"from megatron_patch.__main__ import main; raise SystemExit(main({[*words, '--csv', 'out.csv']}))"
    full = run("-c", f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20)); {command}")
    assert full.returncode == 1 and "device: out.csv: cannot write: File too large" in full.stderr
    assert "Traceback" not in full.stderr and not Path("out.csv").exists()
    with pytest.raises(ValueError, match="its columns are not recipe, form"):
        from_csv("a,b\n1,2\n")


def test_energy_is_counted_over_a_wrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.joules_since({}) is None
    for zone, now in (("intel-rapl:0", 500_000), ("intel-rapl:1", 3_000_000), ("intel-rapl:0:0", 1)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(f"{now}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("4000000\n")
    monkeypatch.setattr(machine, "_RAPL", tmp_path)
    before = machine.energy_counters()
    assert list(before.values()) == [500_000, 3_000_000]
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1500000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("1000000")  # went through 4 J
    assert machine.joules_since(before) == 1 + 2
    assert machine.read_bandwidth(1, repeats=1) > 1e8
