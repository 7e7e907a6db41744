"""CTranslate2 from the expanded folder, by its own converter: it keeps one FFN by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ctranslate2.converters import TransformersConverter

from megatron_patch.convert.export import export
from megatron_patch.devices.runtimes import CTranslate2, RuntimeFormError
from tests.devices.models import NEW_TOKENS, PROMPTS, device_weights, greedy, log_probs


def test_one_ffn_and_the_models_tokens(device_tokenizer: Path, tmp_path: Path) -> None:
    weights = device_weights()
    export(weights, tmp_path / "hf", "expanded", device_tokenizer)
    TransformersConverter(str(tmp_path / "hf")).convert(str(tmp_path / "fp32"))
    TransformersConverter(str(tmp_path / "hf")).convert(str(tmp_path / "int8"), quantization="int8")
    numbers = sum(w.numel() for w in weights.whole.values())
    names = 30_000  # bytes of variables' names and of the scales of int8's rows
    assert 4 * numbers < (tmp_path / "fp32" / "model.bin").stat().st_size < 4 * numbers + names
    assert numbers < (tmp_path / "int8" / "model.bin").stat().st_size < numbers + names

    model = CTranslate2(tmp_path / "fp32", threads=1)
    row = PROMPTS.view(1, -1)
    found = torch.tensor(model.log_probs(row[0].tolist()))
    torch.testing.assert_close(found.double(), log_probs(weights, row)[0], rtol=0, atol=1e-4)
    continued = torch.tensor([model.greedy(prompt.tolist(), NEW_TOKENS).ids for prompt in PROMPTS])
    assert torch.equal(continued, greedy(weights))
    found = torch.tensor(CTranslate2(tmp_path / "int8", threads=1).log_probs(row[0].tolist()))
    assert 1e-4 < (found - log_probs(weights, row)[0]).abs().max() < 0.05

    (tmp_path / "int8" / "model.bin").write_bytes(b"torn")
    with pytest.raises(RuntimeFormError, match="int8: CTranslate2 cannot open it"):
        CTranslate2(tmp_path / "int8", threads=1)
