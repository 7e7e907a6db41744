"""Export against the real transformers: both forms load, agree with a model written out here, and generate."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from data_tools.files.durable import LOCK_NAME, FolderBusy, folder_lock
from megatron_patch.__main__ import main
from megatron_patch.convert import export as export_module
from megatron_patch.convert.export import export, tokenizer_of
from megatron_patch.convert.names import Form, hf_tensors
from megatron_patch.convert.source import ConvertError
from megatron_patch.recipe import load
from megatron_patch.train.checkpoint.write import write_weights
from tests.convert.samples import RECIPES, MemoryWeights, small_recipe


def reference_logits(weights: MemoryWeights, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, vocab] of the shared-FFN model from the whole tensors, in the plainest way."""
    m, w = weights.recipe.model, {k: weights.tensor(k).double() for k in weights.whole}
    n = m.num_ffns
    several = {"blocks": lambda i: f"ffns.{i * n // m.num_layers}", "cycle": lambda i: f"ffns.{i % n}"}
    ffn = {None: lambda i: f"layers.{i}.mlp", 1: lambda i: "ffn"}.get(n, several[m.ffn_pattern])
    b, s = tokens.shape

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return w[name] * x * (x.square().mean(-1, keepdim=True) + m.norm_epsilon).rsqrt()

    angle = torch.outer(
        torch.arange(s, dtype=torch.float64), m.rope_base ** -(torch.arange(0, m.head_dim, 2).double() / m.head_dim)
    ).repeat(1, 2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()

    x = w["embedding.word_embeddings.weight"][tokens]
    for i in range(m.num_layers):
        y = norm(x, f"layers.{i}.input_layernorm.weight") @ w[f"layers.{i}.self_attention.linear_qkv.weight"].T
        q, k, v = (t.transpose(1, 2) for t in y.view(b, s, m.num_attention_heads, 3, m.head_dim).unbind(3))
        scores = rotate(q) @ rotate(k).transpose(-1, -2) / m.head_dim**0.5
        scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, -1)
        x = x + y @ w[f"layers.{i}.self_attention.linear_proj.weight"].T
        y = norm(x, f"layers.{i}.pre_mlp_layernorm.weight")
        gate, up = w[f"{ffn(i)}.linear_fc1.weight"]
        x = x + (torch.nn.functional.silu(y @ gate.T) * (y @ up.T)) @ w[f"{ffn(i)}.linear_fc2.weight"].T
    return norm(x, "final_layernorm.weight") @ w["output_layer.weight"].T


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ["mobillama_05b", "large_base"])
def test_expanded_is_stock_llama(name: str, tokenizer: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    weights = MemoryWeights(small_recipe(name=name))
    export(weights, tmp_path / "hf", "expanded", tokenizer)
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.num_key_value_heads == 4
    logits = model(tokens).logits
    torch.testing.assert_close(logits.double(), reference_logits(weights, tokens), rtol=1e-4, atol=1e-4)
    assert (logits - reference_logits(weights, tokens)).norm() < 1e-5 * logits.norm()


def test_shared_holds_one_ffn_and_generates(
    weights: MemoryWeights, tokenizer: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    export(weights, tmp_path / "hf", "shared", tokenizer)
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert len(file.keys()) == 1 + 3 * 6 + 3 + 2
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.num_parameters() == sum(t.numel() for t in weights.whole.values())
    logits = model(tokens).logits
    assert (logits - reference_logits(weights, tokens)).norm() < 1e-5 * logits.norm()

    generated = model.generate(tokens[:1, :5], max_new_tokens=8, do_sample=False, eos_token_id=None)
    expected = tokens[:1, :5]
    for _ in range(8):
        expected = torch.cat([expected, reference_logits(weights, expected)[:, -1:].argmax(-1)], 1)
    assert generated.tolist() == expected.tolist()

    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(tokens).logits, logits)


@pytest.mark.parametrize(
    ("form", "trained", "named", "dtype"),
    [
        ("expanded", "fp32", "fp16", "float16"),
        ("shared", "fp32", "bf16", "bfloat16"),
        ("shared", "bf16", "fp16", "float16"),
        ("expanded", "bf16", "fp32", "float32"),
    ],
)
def test_a_dtype_is_what_transformers_rounds_to(
    form: Form, trained: str, named: str, dtype: str, tokenizer: Path, tmp_path: Path
) -> None:
    stored = torch.bfloat16 if trained == "bf16" else torch.float32
    write_weights(MemoryWeights(small_recipe(f"precision={trained}"), dtype=stored), tmp_path / "checkpoint")
    words = ["export", str(tmp_path / "checkpoint"), "--form", form, "--tokenizer", str(tokenizer)]
    assert main([*words, str(tmp_path / "own")]) == 0
    assert main([*words, str(tmp_path / "rounded"), "--dtype", named]) == 0
    settings = {"trust_remote_code": form == "shared"}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype=getattr(torch, dtype), **settings).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded", dtype="auto", **settings)
    assert str(ours.dtype) == f"torch.{dtype}" and ours.state_dict().keys() == stock.keys()
    for name, tensor in load_file(tmp_path / "rounded" / "model.safetensors").items():
        assert tensor.dtype is ours.dtype and torch.equal(tensor, stock[name])
        assert torch.equal(tensor, ours.state_dict()[name])


def test_what_a_dtype_cannot_hold_is_refused(
    weights: MemoryWeights, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """65,519 still rounds to fp16's largest number, 65,520 does not."""
    for value, code in ((-65519.0, 0), (-65520.0, 2)):
        weights.whole["ffn.linear_fc1.weight"][1, 3, 4] = value
        write_weights(weights, tmp_path / f"{value}")
        words = ["export", str(tmp_path / f"{value}"), "--form", "shared", "--tokenizer", str(tokenizer)]
        assert main([*words, str(tmp_path / f"hf{code}"), "--dtype", "fp16"]) == code
    assert "model.ffn.up_proj.weight: holds 65520, beyond the 65,504 of torch.float16" in capsys.readouterr().err
    assert not (tmp_path / "hf2").exists()
    assert main([*words, str(tmp_path / "hf2"), "--dtype", "bf16"]) == 0
    words[words.index("shared")] = "gguf"
    assert main([*words, str(tmp_path / "m.gguf"), "--dtype", "bf16"]) == 2
    assert "--form gguf has --quantize f32, f16" in capsys.readouterr().err


def test_expanded_generates(weights: MemoryWeights, tokenizer: Path, tmp_path: Path) -> None:
    export(weights, tmp_path / "hf", "expanded", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("the quick", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).shape == (1, ids.shape[1] + 4)


def test_names_of_the_05b() -> None:
    model = load(RECIPES / "mobillama_05b.yaml").model
    shared = hf_tensors(model, "shared")
    assert len(shared) == len({t.name for t in shared}) == 138
    assert sum(torch.Size(t.shape).numel() for t in shared) == 534_865_920
    expanded = hf_tensors(model, "expanded")
    assert sum(torch.Size(t.shape).numel() for t in expanded) == 1_261_529_088
    with pytest.raises(ValueError, match="FFN of its own"):
        hf_tensors(load(RECIPES / "large_base.yaml").model, "shared")


def test_tokenizer_adds_nothing(weights: MemoryWeights, tokenizer: Path, tmp_path: Path) -> None:
    export(weights, tmp_path / "hf", "shared", tokenizer)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("the quick brown fox", " two  spaces", "na\u00efve \u65e5\u672c\n\ttabs 1234", ""):
        assert tokenizer(text)["input_ids"] == ours.encode(text)
        assert tokenizer.decode(ours.encode(text)) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 1)


def test_batches_are_padded_on_the_left(weights: MemoryWeights, tokenizer: Path, tmp_path: Path) -> None:
    export(weights, tmp_path / "hf", "expanded", tokenizer)
    model, tokenizer = (auto.from_pretrained(tmp_path / "hf") for auto in (AutoModelForCausalLM, AutoTokenizer))
    texts = ["the quick brown", "dog"]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    both = model.generate(**tokenizer(texts, return_tensors="pt", padding=True), **settings)
    for text, row in zip(texts, both, strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **settings)
        assert row[-6:].tolist() == alone[0, -6:].tolist()


def test_a_tokenizer_of_older_and_of_other_making(weights: MemoryWeights, tokenizer: Path, tmp_path: Path) -> None:
    export(weights, tmp_path / "one", "shared", tokenizer)
    content = json.loads((tmp_path / "one" / "tokenizer.json").read_text())
    assert all(isinstance(merge, str) for merge in content["model"]["merges"])  # what tokenizers before 0.20 reads
    config = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())
    assert config["model_input_names"] == ["input_ids", "attention_mask"]  # what generate of transformers 4 takes

    vocab, swapped = content["model"]["vocab"], {"</s>": 1, "<s>": 2}
    other = tmp_path / "other.json"
    content["model"]["vocab"] = {token: swapped.get(token, i) for token, i in vocab.items()}
    content["added_tokens"] = [{**a, "id": swapped.get(a["content"], a["id"])} for a in content["added_tokens"]]
    other.write_text(json.dumps(content))
    export(weights, tmp_path / "two", "shared", other)
    for file in ("config.json", "generation_config.json"):
        ids = json.loads((tmp_path / "two" / file).read_text())
        assert (ids["bos_token_id"], ids["eos_token_id"]) == (2, 1)
    assert AutoTokenizer.from_pretrained(tmp_path / "two").eos_token_id == 1

    del content["model"]["vocab"]["</s>"]
    content["added_tokens"] = [a for a in content["added_tokens"] if a["content"] != "</s>"]
    other.write_text(json.dumps(content))
    with pytest.raises(ConvertError, match="no token </s>"):
        export(weights, tmp_path / "three", "shared", other)
    other.write_text('{"model": {}}')
    with pytest.raises(ConvertError, match=r"other\.json: not a tokenizer"):
        export(weights, tmp_path / "three", "shared", other)


def test_whoever_may_use_the_folder_may_read_its_files(weights: MemoryWeights, tokenizer: Path, tmp_path: Path) -> None:
    """safetensors makes its files for their owner alone."""
    export(weights, tmp_path / "hf", "shared", tokenizer)
    rights = {file.name: file.stat().st_mode for file in (tmp_path / "hf").iterdir()}
    assert len(set(rights.values())) == 1, rights


def test_a_full_disk_and_a_second_export_are_named(weights: MemoryWeights, tokenizer: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # of a file's bytes; the weights need more
    try:
        with pytest.raises(ConvertError, match=r"hf: cannot be written .*; free space"):
            export(weights, tmp_path / "hf", "shared", tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("hf*"))
    with folder_lock(tmp_path / "hf.partial"), pytest.raises(FolderBusy):
        export(weights, tmp_path / "hf", "shared", tokenizer)
    (tmp_path / "hf.partial" / "model.safetensors").touch()  # of an export that was killed
    export(weights, tmp_path / "hf", "shared", tokenizer)
    assert [path.name for path in tmp_path.glob("hf*")] == ["hf"]
    assert not (tmp_path / "hf" / LOCK_NAME).exists()


def test_shards_and_index(
    weights: MemoryWeights, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(weights, tmp_path / "whole", "expanded", tokenizer)
    monkeypatch.setattr(export_module, "SHARD_BYTES", 20_000)
    export(weights, tmp_path / "sharded", "expanded", tokenizer)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 5
    assert all((tmp_path / "sharded" / file).is_file() for file in files)
    one, many = (LlamaForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("whole", "sharded"))
    assert all(torch.equal(one[k], many[k]) for k in one)
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in one.values())


def test_provenance_and_card(weights: MemoryWeights, tokenizer: Path, tmp_path: Path) -> None:
    weights.dtype = torch.bfloat16
    export(weights, tmp_path / "hf", "shared", tokenizer)
    provenance = json.loads((tmp_path / "hf" / "provenance.json").read_text())
    assert provenance["tokens"] == 2133 * 800 * 2048
    card = (tmp_path / "hf" / "README.md").read_text()
    for text in ("mobillama_05b", "2,133", "3,494,707,200", "5eed", "da7a", "4 heads", "Not evaluated"):
        assert text in card
    assert load(tmp_path / "hf" / "recipe.yaml") == weights.recipe
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).dtype == torch.bfloat16


def test_refusals(weights: MemoryWeights, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConvertError, match="taken: exists"):
        export(weights, tmp_path / "taken", "shared", tokenizer)
    with pytest.raises(ConvertError, match="--tokenizer"):
        tokenizer_of(weights.recipe)
    with pytest.raises(ConvertError, match="320 ids, but the model has 300"):
        export(MemoryWeights(small_recipe("model.vocab_size=300")), tmp_path / "hf", "shared", tokenizer)
    dedicated = MemoryWeights(small_recipe(name="large_base"))
    with pytest.raises(ConvertError, match="only `expanded` exists"):
        export(dedicated, tmp_path / "hf", "shared", tokenizer)
    with pytest.raises(ValueError, match="no such tokenizer"):
        export(dedicated, tmp_path / "hf", "expanded", tmp_path / "absent.model")
    assert not (tmp_path / "hf").exists()
