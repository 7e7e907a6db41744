"""GGUF files in llama.cpp itself: ids, log-probabilities and greedy tokens against the float64 model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Tokenizer

from data_tools.files.durable import FolderBusy, folder_lock
from data_tools.sources.text_encoder import read_tokenizer_json
from megatron_patch.__main__ import main
from megatron_patch.convert import gguf_file
from megatron_patch.convert.ggml_vocab import ggml_vocab
from megatron_patch.convert.gguf_file import write_gguf
from megatron_patch.convert.source import ConvertError
from megatron_patch.devices.runtimes import LlamaCpp, RuntimeFormError
from megatron_patch.train.checkpoint.write import write_weights
from tests.convert.samples import MemoryWeights
from tests.devices.models import NEW_TOKENS, PROMPTS, device_weights, greedy, log_probs, sure_weights
from tests.devices.texts import HARD_TEXTS


def llama(file: Path, exact: bool = False) -> LlamaCpp:
    return LlamaCpp(file, threads=1, context=256, exact=exact)


def continued(model: LlamaCpp) -> torch.Tensor:
    return torch.tensor([model.greedy(row.tolist(), NEW_TOKENS).ids for row in PROMPTS])


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mobillama_05b", []),
        ("mobillama_05b", ["model.num_ffns=3"]),
        ("mobillama_05b", ["model.num_ffns=2", "model.ffn_pattern=cycle"]),
        ("large_base", []),
    ],
)
def test_f32_is_the_model(name: str, overrides: list[str], device_tokenizer: Path, tmp_path: Path) -> None:
    weights = device_weights(*overrides, name=name)
    assert write_gguf(weights, tmp_path / "m.gguf", device_tokenizer) == []
    model = llama(tmp_path / "m.gguf", exact=True)
    expected = greedy(weights)
    assert torch.equal(continued(model), expected)
    row = torch.cat([PROMPTS[:1], expected[:1]], 1)
    found = torch.tensor(model.log_probs(row[0].tolist()))
    torch.testing.assert_close(found.double(), log_probs(weights, row)[0], rtol=0, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_bf16_chooses_alike(device_tokenizer: Path, tmp_path: Path) -> None:
    weights = sure_weights()
    write_gguf(weights, tmp_path / "m.gguf", device_tokenizer, "bf16")
    assert torch.equal(continued(llama(tmp_path / "m.gguf")), greedy(weights))


@pytest.mark.parametrize(
    ("quantize", "bits", "apart"),
    [("bf16", 16, 0.02), ("f16", 16, 0.01), ("q8_0", 8.5, 0.04), ("q5_1", 6, 0.25), ("q4_0", 4.5, 0.5)],
)
def test_smaller_forms_are_near(
    quantize: str, bits: float, apart: float, device_tokenizer: Path, tmp_path: Path
) -> None:
    weights = device_weights()
    write_gguf(weights, tmp_path / "m.gguf", device_tokenizer, quantize)
    row = PROMPTS.view(1, -1)
    found = torch.tensor(llama(tmp_path / "m.gguf").log_probs(row[0].tolist()))
    difference = (found - log_probs(weights, row)[0]).abs().max()
    assert apart / 20 < difference < apart
    matrices = [t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if len(t.shape) == 2]
    assert sum(t.n_bytes for t in matrices) * 8 == bits * sum(t.n_elements for t in matrices)


def test_ids_are_llama_cpps(device_tokenizer: Path, tmp_path: Path) -> None:
    """Of a tokenizer.model and of the tokenizer.json made from it."""
    content = read_tokenizer_json(device_tokenizer)
    (tmp_path / "tokenizer.json").write_text(content)
    ours = Tokenizer.from_str(content)
    for number, tokenizer in enumerate((device_tokenizer, tmp_path / "tokenizer.json")):
        write_gguf(device_weights(), tmp_path / f"{number}.gguf", tokenizer)
        model = llama(tmp_path / f"{number}.gguf")
        for text in HARD_TEXTS:
            assert model.tokenize(text) == ours.encode(text).ids, repr(text)


def test_what_llama_cpp_would_split_otherwise_is_refused(device_tokenizer: Path, tmp_path: Path) -> None:
    content = json.loads(read_tokenizer_json(device_tokenizer))
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False}
    assert ggml_vocab(json.dumps({**content, "normalizer": None, "pre_tokenizer": metaspace}), 1000, "t").space_prefix

    def refused(words: str, **changed: object) -> None:
        with pytest.raises(ConvertError, match=words):
            ggml_vocab(json.dumps({**content, **changed}), 1000, "other.json")

    merges = content["model"]["merges"]
    refused(r"other\.json: does not merge", model={**content["model"], "merges": merges[:-1]})
    again = next(i for i, m in enumerate(merges) if merges[i + 1].replace(" ", "") == m.replace(" ", ""))
    apart = [*merges[:again], *merges[again + 1 :], merges[again]]
    refused("do not stand together", model={**content["model"], "merges": apart})
    refused("makes no piece", model={**content["model"], "merges": ["the quick", *merges]})
    refused("byte fallback", model={**content["model"], "byte_fallback": False})
    refused("byte fallback", model={**content["model"], "type": "Unigram"})
    refused("normalises or splits", normalizer={"type": "NFKC"})
    refused("normalises or splits", pre_tokenizer={"type": "ByteLevel"})
    refused("normalises or splits", normalizer=None, pre_tokenizer={**metaspace, "prepend_scheme": "first"})


def test_chat_template_and_added_tokens_travel(device_tokenizer: Path, tmp_path: Path) -> None:
    content = json.loads(read_tokenizer_json(device_tokenizer))
    added = {**content["added_tokens"][0], "content": "<|user|>", "id": len(content["model"]["vocab"])}
    content["added_tokens"].append(added)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    write_gguf(device_weights(), tmp_path / "m.gguf", tmp_path / "tokenizer.json")
    ours = Tokenizer.from_str(json.dumps(content))
    model = llama(tmp_path / "m.gguf")
    for text in ("<|user|>\nHi</s>", "a <|user|> b", "<|user|><|user|> "):
        assert model.tokenize(text) == ours.encode(text).ids

    found = []
    for name, text in (("chat_template.jinja", "{{ 1 }}"), ("tokenizer_config.json", '{"chat_template": "{{ 2 }}"}')):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / name).write_text(text)
        found.append(gguf_file.chat_template(folder))
    assert found == ["{{ 1 }}", "{{ 2 }}"]


def test_a_width_without_whole_blocks_is_named(
    weights: MemoryWeights, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FFN rows of 48 are no whole blocks of 32."""
    write_weights(weights, tmp_path / "checkpoint")
    words = ["export", str(tmp_path / "checkpoint"), str(tmp_path / "m.gguf"), "--tokenizer", str(tokenizer)]
    assert main([*words, "--form", "gguf", "--quantize", "q4_0"]) == 0
    told = capsys.readouterr().err
    assert "3 tensors" in told and "model.layers.2.mlp.down_proj.weight" in told and "f16" in told
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.2.ffn_down.weight"] == "F16" and types["blk.2.ffn_up.weight"] == "Q4_0"
    assert types["output_norm.weight"] == "F32"
    assert main([*words, "--form", "gguf"]) == 2
    assert "m.gguf: exists; choose a new file" in capsys.readouterr().err
    assert main([*words, "--form", "expanded", "--quantize", "q4_0"]) == 2
    assert "--form expanded has none; choose --form gguf" in capsys.readouterr().err


def test_what_cannot_be_stored_is_refused(device_tokenizer: Path, tmp_path: Path) -> None:
    weights = device_weights()
    weights.whole["ffn.linear_fc2.weight"][3, 4] = 1e7
    for kind in ("f16", "q8_0", "q4_0"):  # in fp16 the scales of blocks are infinite, and with them 32 weights
        with pytest.raises(ConvertError, match=r"down_proj\.weight: holds values beyond fp16"):
            write_gguf(weights, tmp_path / "m.gguf", device_tokenizer, kind)
    weights.whole["ffn.linear_fc2.weight"][3, 4] = float("nan")
    with pytest.raises(ConvertError, match=r"ffn\.linear_fc2\.weight: holds values that are not finite"):
        write_gguf(weights, tmp_path / "m.gguf", device_tokenizer)
    with folder_lock(tmp_path / "m.gguf.partial"), pytest.raises(FolderBusy):
        write_gguf(weights, tmp_path / "m.gguf", device_tokenizer)
    shutil.rmtree(tmp_path / "m.gguf.partial")
    assert not list(tmp_path.iterdir())
    (tmp_path / "torn.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(RuntimeFormError, match=r"torn\.gguf: llama\.cpp cannot open it"):
        llama(tmp_path / "torn.gguf")
