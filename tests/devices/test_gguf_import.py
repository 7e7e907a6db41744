"""Import of GGUF files: bit for bit what was exported and what transformers reads; the rest is refused."""

from __future__ import annotations

import contextlib
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue
from transformers import AutoModelForCausalLM

from megatron_patch.__main__ import main
from megatron_patch.convert import gguf_file
from megatron_patch.convert.gguf_file import write_gguf
from megatron_patch.convert.gguf_weights import GgufWeights
from megatron_patch.convert.imported import ImportedModel, recipe_of
from megatron_patch.convert.names import hf_tensors
from megatron_patch.convert.source import ConvertError
from megatron_patch.recipe import RecipeError
from megatron_patch.train.checkpoint.reader import open_checkpoint
from megatron_patch.train.checkpoint.write import write_weights
from tests.convert.samples import MemoryWeights
from tests.devices.models import device_recipe, device_weights

Keys = dict[str, GGUFValue]


@pytest.fixture
def write(device_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a file whose keys are changed before they are written."""

    def written(change: Callable[[Keys], object] = lambda keys: None, kind: str | None = None) -> Path:
        file = tmp_path / "m.gguf"
        file.unlink(missing_ok=True)

        class Writer(gguf.GGUFWriter):
            def write_header_to_file(self, path: Path | None = None) -> None:
                change(self.kv_data[0])
                super().write_header_to_file(path)

        with monkeypatch.context() as patch:
            patch.setattr("megatron_patch.convert.gguf_file.gguf.GGUFWriter", Writer)
            write_gguf(device_weights(), file, device_tokenizer, kind)
        return file

    return written


@pytest.mark.parametrize(
    ("precision", "kind", "name", "ffns"),
    [
        ("fp32", "f32", "mobillama_05b", 1),
        ("bf16", "bf16", "mobillama_05b", 2),  # layers 0 and 1 share one, 2 and 3 the other
        ("bf16", "q8_0", "large_base", 4),
    ],
)
def test_exported_imported_and_exported_again(
    precision: str,
    kind: str,
    name: str,
    ffns: int,
    device_tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shared = [] if ffns == 4 else [f"model.num_ffns={ffns}"]
    weights = MemoryWeights(device_recipe(f"precision={precision}", *shared, name=name), scale=0.05, dtype=dtype)
    write_weights(weights, tmp_path / "one")
    words = ["--form", "gguf", "--quantize", kind, "--tokenizer", str(device_tokenizer)]
    assert main(["export", str(tmp_path / "one"), str(tmp_path / "m.gguf"), *words]) == 0
    assert main(["import", str(tmp_path / "m.gguf"), str(tmp_path / "two")]) == 0
    told = capsys.readouterr().err
    assert ("were rounded to Q8_0" in told) == (kind == "q8_0") and "from transformers" in told
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).state_dict()
    model = ImportedModel(tmp_path / "m.gguf", recipe_of(tmp_path / "m.gguf", None))
    assert stock.keys() == (ours := model.hf_state()).keys() and all(torch.equal(stock[n], ours[n]) for n in ours)
    assert (model.step, model.samples, model.data_digest) == (weights.step, weights.samples, weights.data_digest)
    with open_checkpoint(tmp_path / "two") as two:
        assert two.recipe == weights.recipe.model_copy(update={"precision": "fp32" if kind == "q8_0" else precision})
        if kind != "q8_0":
            assert all(torch.equal(two.tensor(name), tensor) for name, tensor in weights.whole.items())
    assert main(["export", str(tmp_path / "two"), str(tmp_path / "again.gguf"), *words]) == 0
    first, second = (gguf.GGUFReader(tmp_path / file).tensors for file in ("m.gguf", "again.gguf"))
    assert all((a.data == b.data).all() for a, b in zip(first, second, strict=True))


def test_one_changed_bit_in_a_copy_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    file = write(kind="q8_0")
    reader = gguf.GGUFReader(file, "r+")
    [copy] = [t for t in reader.tensors if t.name == "blk.2.ffn_up.weight"]
    copy.data[7, 9] ^= 1
    reader.data.flush()
    with pytest.raises(ConvertError, match=r"layers\.2\.mlp\.up_proj\.weight differs from layer 0"):
        ImportedModel(file, device_recipe())
    assert main(["import", str(file), str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()


def test_a_file_without_a_head_is_tied(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "hf_tensors", lambda *words: hf_tensors(*words)[:-1])
    model = ImportedModel(write(), device_recipe())
    assert model.is_tied
    assert torch.equal(model.tensor("output_layer.weight"), model.tensor("embedding.word_embeddings.weight"))


def test_what_computes_otherwise_is_refused(write: Callable[..., Path]) -> None:
    kinds = {int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}

    def refused(words: str, kind: str | None = None, **changed: Any) -> None:
        def change(keys: Keys) -> None:
            for key, value in changed.items():
                name = key.replace("__", ".")
                name = name if "." in name else f"llama.{name}"
                keys[name] = value if isinstance(value, GGUFValue) else GGUFValue(value, kinds[type(value)])

        with pytest.raises(ConvertError, match=words):
            ImportedModel(write(change, kind), device_recipe())

    refused("general.architecture is 'qwen3'; llama is imported", general__architecture="qwen3")
    refused("general.type is 'adapter', which computes otherwise", general__type="adapter")
    refused("rope.scaling.type is 'yarn'", llama__rope__scaling__type="yarn")
    refused(r"rope.scaling.factor is 2.0", llama__rope__scaling__factor=2.0)
    refused("rope.dimension_count is 8, .* \\(16\\)", llama__rope__dimension_count=8)
    refused("head_count_kv is 2", llama__attention__head_count_kv=2)
    refused("attention.key_length is 32", llama__attention__key_length=32)
    refused("sliding_window is 128", llama__attention__sliding_window=128)
    refused("expert_count is 8", expert_count=8)
    refused("unknown key 'llama.logit_scale'", logit_scale=2.0)
    refused("unknown key 'clip.vision", clip__vision__x=1)
    refused("rms_norm_eps is 1e-06, but the recipe", llama__attention__layer_norm_rms_epsilon=1e-6)
    refused("base 500000; the recipe", llama__rope__freq_base=500_000.0)
    refused("freq_base is nan", llama__rope__freq_base=float("nan"))
    heads = {"llama__attention__head_count": 8, "llama__attention__head_count_kv": 8}
    refused("hidden_size is 128, but the recipe", embedding_length=128, **heads)
    refused("num_hidden_layers is 3", block_count=3)
    refused("head_count is 7, llama.embedding_length 64", llama__attention__head_count=7)
    refused("head_count is 0, no model's", llama__attention__head_count=0)
    layers = GGUFValue([96, 96, 96, 96], GGUFValueType.ARRAY, GGUFValueType.INT32)
    refused("feed_forward_length is 'an array of INT32'", feed_forward_length=layers)
    refused("block_count is 4.0", block_count=4.0)
    refused("vocab_size is 999", vocab_size=999)
    refused("split.count is 2", split__count=2)
    refused(r"blk\.0\.\w+\.weight is Q4_0|token_embd.weight is Q4_0, too far from", kind="q4_0")
    refused(r"provenance\): damaged \(step is -1", mobillama__provenance='{"step": -1}')
    refused(r"provenance\): damaged \(nested without end", mobillama__provenance="[" * 100_000)


def test_its_recipe_and_others(write: Callable[..., Path]) -> None:
    file = write(lambda keys: keys.pop("mobillama.recipe"))
    with pytest.raises(ConvertError, match=r"m\.gguf: carries no recipe; name the model's"):
        recipe_of(file, None)
    for text, words in (("extends: base.yaml", "extends: unknown key"), ("[1]", "expected a mapping"), ("{", "YAML")):
        changed = {"mobillama.recipe": GGUFValue(text, GGUFValueType.STRING)}
        with pytest.raises(RecipeError, match=rf"m\.gguf \(mobillama.recipe\)[^$]*{words}"):
            recipe_of(write(lambda keys, changed=changed: keys.update(changed)), None)
    without = write(lambda keys: [keys.pop(name) for name in ("llama.vocab_size", "mobillama.provenance")])
    assert ImportedModel(without, device_recipe()).step == 0


def u(kind: str, *numbers: int) -> bytes:
    return struct.pack(f"<{kind}", *numbers)


KEY = u("Q1s", 1, b"k")  # type: ignore[arg-type]
TENSOR = u("Q1s", 1, b"t")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGML" + u("IQQ", 3, 0, 0),
        b"GGUF" + u("IQQ", 9, 0, 0),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        b"GGUF" + u("IQQ", 3, 0, 2**63),
        b"GGUF" + u("IQQ", 3, 2**60, 0),
        b"GGUF" + u("IQQ", 3, 0, 1) + u("Q", 2**64 - 1),
        b"GGUF" + u("IQQ", 3, 0, 1) + KEY + u("IIQ", 9, 8, 2**63) + bytes(4096),
        b"GGUF" + u("IQQ", 3, 0, 1) + KEY + u("IIQ", 9, 4, 2**62) + bytes(4096),
        b"GGUF" + u("IQQ", 3, 0, 1) + KEY + u("I", 9) + u("IQ", 9, 1) * 5000,
        b"GGUF" + u("IQQ", 3, 0, 1) + KEY + u("IIQ", 9, 77, 1) + bytes(64),
        b"GGUF" + u("IQQ", 3, 0, 2) + (KEY + u("II", 4, 1)) * 2,
        b"GGUF" + u("IQQ", 3, 0, 1) + u("Q2s", 2, b"\xff\xfe") + u("II", 4, 1),  # type: ignore[arg-type]
        b"GGUF" + u("IQQ", 3, 1, 0) + TENSOR + u("I", 2**31) + bytes(4096),
        b"GGUF" + u("IQQ", 3, 1, 0) + TENSOR + u("IQQ", 2, 2**63, 2) + u("IQ", 0, 0) + bytes(4096),
        b"GGUF" + u("IQQ", 3, 1, 0) + TENSOR + u("IQ", 1, 2**40) + u("IQ", 0, 0) + bytes(4096),
        b"GGUF" + u("IQQ", 3, 1, 0) + TENSOR + u("IQ", 1, 4) + u("IQ", 999, 0) + bytes(4096),
        b"GGUF" + u("IQQ", 3, 1, 0) + TENSOR + u("IQ", 1, 4) + u("IQ", 0, 2**64 - 32) + bytes(4096),
        b"GGUF" + u("IQQ", 3, 2, 0) + TENSOR + u("IQIQ", 1, 4, 0, 0) + u("Q1sIQIQ", 1, b"s", 1, 4, 0, 0) + bytes(4096),  # type: ignore[arg-type]
    ],
)
def test_hostile_headers_are_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(ConvertError, match=r"m\.gguf: no GGUF file, or damaged \(.+\); fetch it again"):
        GgufWeights(file)


def test_torn_and_mutated_files_are_refused_or_whole(write: Callable[..., Path], tmp_path: Path) -> None:
    whole = write().read_bytes()
    header = int(gguf.GGUFReader(tmp_path / "m.gguf").data_offset)
    file, draws = tmp_path / "other.gguf", random.Random(5)
    for length in [*range(1, header, header // 40), header, len(whole) // 2, len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(ConvertError, match=r"other\.gguf: no GGUF file, or damaged"):
            GgufWeights(file)
    opened = 0
    for _ in range(100):
        mutated = bytearray(whole)
        for at in draws.choices(range(header), k=draws.randint(1, 3)):
            mutated[at] = draws.choice((0, 1, 9, 127, 255, draws.randrange(256)))
        file.write_bytes(mutated)
        with contextlib.suppress(ConvertError):
            opened += bool(GgufWeights(file).config)
    assert 0 < opened < 100
    os.mkfifo(tmp_path / "pipe.gguf")
    for name, words in (("pipe.gguf", "no plain file"), ("absent.gguf", "no such file")):
        with pytest.raises(ConvertError, match=words):
            ImportedModel(tmp_path / name, device_recipe())
