"""ONNX folders in ONNX Runtime: one FFN in the file, the float64 model's log-probabilities and greedy tokens."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from megatron_patch.__main__ import main
from megatron_patch.convert.onnx_folder import FILES, quantized, write_onnx
from megatron_patch.convert.source import ConvertError
from megatron_patch.devices.runtimes import OnnxRuntime, RuntimeFormError
from megatron_patch.train.checkpoint.write import write_weights
from tests.convert.samples import MemoryWeights
from tests.convert.test_export import reference_logits
from tests.devices.models import NEW_TOKENS, PROMPTS, device_weights, greedy, log_probs

ROW = PROMPTS.view(1, -1)


@pytest.mark.parametrize(("name", "ffns"), [("mobillama_05b", 1), ("mobillama_05b", 2), ("large_base", 4)])
def test_fp32_is_the_model_and_holds_each_ffn_once(
    name: str, ffns: int, device_tokenizer: Path, tmp_path: Path
) -> None:
    weights = device_weights(*(["model.num_ffns=2", "model.ffn_pattern=cycle"] if ffns == 2 else []), name=name)
    write_onnx(weights, tmp_path / "out", device_tokenizer)
    file = tmp_path / "out" / "onnx" / "model.onnx"
    onnx.checker.check_model(file, full_check=True)
    graph = onnx.load(file, load_external_data=False).graph
    held = [t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert sum("gate_proj" in n or "up_proj" in n or "down_proj" in n for n in held) == 3 * ffns
    uses = Counter(name for node in graph.node for name in node.input)
    assert {uses[n] for n in held if "gate_proj" in n} == {4 // ffns}
    assert sum(int(np.prod(t.dims)) for t in graph.initializer if t.name in held) == sum(
        t.numel() for t in weights.whole.values()
    )
    model = OnnxRuntime(file, threads=1)
    found = torch.tensor(model.log_probs(ROW[0].tolist()))
    torch.testing.assert_close(found.double(), log_probs(weights, ROW)[0], rtol=0, atol=1e-4)
    if name == "mobillama_05b":
        continued = torch.tensor([model.greedy(row.tolist(), NEW_TOKENS).ids for row in PROMPTS])
        assert torch.equal(continued, greedy(weights))


def test_a_batch_padded_on_the_left_and_a_prompt_in_two_halves(device_tokenizer: Path, tmp_path: Path) -> None:
    weights = device_weights()
    write_onnx(weights, tmp_path / "out", device_tokenizer)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / "model.onnx")
    names = [i.name for i in session.get_inputs()]
    assert names == [
        "input_ids", "attention_mask", "position_ids",
        *(f"past_key_values.{i}.{part}" for i in range(4) for part in ("key", "value")),
    ]  # fmt: skip
    outputs = ["logits", *(n.replace("past_key_values", "present") for n in names[3:])]
    assert [o.name for o in session.get_outputs()] == outputs
    long, short = PROMPTS[0].numpy(), PROMPTS[1, :5].numpy()
    mask = np.array([[1] * 12, [0] * 7 + [1] * 5])
    ids = np.array([long, [0] * 7 + list(short)])
    position = np.maximum(mask.cumsum(1) - 1, 0)
    past = {name: np.zeros((2, 4, 0, 16), np.float32) for name in names[3:]}
    split = 9
    first = session.run(outputs, {
        "input_ids": ids[:, :split], "attention_mask": mask[:, :split], "position_ids": position[:, :split], **past
    })  # fmt: skip
    past = dict(zip(names[3:], first[1:], strict=True))
    second = session.run(outputs, {
        "input_ids": ids[:, split:], "attention_mask": mask, "position_ids": position[:, split:], **past
    })  # fmt: skip
    logits = np.concatenate([first[0], second[0]], 1)
    for row, alone in ((logits[0], long), (logits[1, 7:], short)):
        expected = reference_logits(weights, torch.from_numpy(alone)[None])[0].numpy()
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-4)
    assert second[1].shape == (2, 4, 12, 16)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4)])
def test_quantized_once_and_near(kind: str, bits: int, device_tokenizer: Path, tmp_path: Path) -> None:
    """Against the float64 model of the weights that the file holds, and of those that it was made from."""
    weights = device_weights()
    write_onnx(weights, tmp_path / "out", device_tokenizer, kind)
    file = tmp_path / "out" / "onnx" / FILES[kind]
    held = [t.name for t in onnx.load(file, load_external_data=False).graph.initializer]
    assert sorted(n for n in held if n.startswith("ffn.")) == sorted(
        f"ffn.{n}_proj.weight{end}" for n in ("gate", "up", "down") for end in ("", ".scales")
    )
    found = torch.tensor(OnnxRuntime(file, threads=1).log_probs(ROW[0].tolist()))
    rounded = MemoryWeights(weights.recipe, changed={n: _rounded(w, bits) for n, w in weights.whole.items()})
    rounded.whole  # noqa: B018
    of_file = (found - log_probs(rounded, ROW)[0]).abs().max()
    of_source = (found - log_probs(weights, ROW)[0]).abs().max()
    assert of_file < 0.02 and of_source < {8: 0.03, 4: 0.5}[bits]
    matrices = sum(w.numel() for w in weights.whole.values() if w.ndim > 1)
    size = file.with_name(file.name + "_data").stat().st_size
    assert matrices * (bits + 1) / 8 < size < matrices * (bits + 1) / 8 + 4096 * len(held)


def _rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    if weight.ndim == 1:
        return weight
    codes, scales = quantized(weight.reshape(-1, weight.shape[-1]).numpy(), bits)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], 32)
    values = (codes.astype(np.float64) - (1 << bits - 1)) * scales[..., None]
    return torch.from_numpy(values).reshape(weight.shape)


def test_blocks_without_values_and_of_one_sign() -> None:
    values = np.zeros((2, 64), np.float32)
    values[0, 32:] = np.linspace(0.5, 1, 32)
    values[1, 3] = -7
    restored = _rounded(torch.from_numpy(values), 4).numpy()
    assert np.abs(restored - values).max() <= 1 / 8 and restored[1, 3] == -7 and not restored[0, :32].any()


def test_refusals(weights: MemoryWeights, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FFN rows of 48 are no whole blocks of 32."""
    write_weights(weights, tmp_path / "checkpoint")
    words = ["export", str(tmp_path / "checkpoint"), str(tmp_path / "out"), "--form", "onnx"]
    assert main([*words, "--tokenizer", str(tokenizer), "--quantize", "int4"]) == 2
    assert "model.layers.0.mlp.down_proj.weight have 48 weights, no whole number of blocks" in capsys.readouterr().err
    assert main([*words, "--tokenizer", str(tokenizer), "--quantize", "q4_0"]) == 2
    assert "--form onnx has int8, int4" in capsys.readouterr().err
    assert main([*words, "--tokenizer", str(tokenizer)]) == 0
    assert main([*words, "--tokenizer", str(tokenizer)]) == 2
    assert "out" in (told := capsys.readouterr().err) and "exists" in told
    weights.whole["ffn.linear_fc1.weight"][0, 0, 0] = float("inf")
    with pytest.raises(ConvertError, match=r"ffn\.linear_fc1\.weight: holds values that are not finite"):
        write_onnx(weights, tmp_path / "other", tokenizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "out"]
    (tmp_path / "out" / "onnx" / "model.onnx_data").write_bytes(b"")
    with pytest.raises(RuntimeFormError, match=r"model\.onnx: ONNX Runtime cannot open it"):
        OnnxRuntime(tmp_path / "out" / "onnx" / "model.onnx", threads=1)
