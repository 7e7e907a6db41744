"""The exported folder of a model that sees in stock `LlavaForConditionalGeneration`, against our own logits."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from data_tools.vision.pictures import prepare
from megatron_patch.convert.export import export
from megatron_patch.convert.gguf_file import write_gguf
from megatron_patch.convert.onnx_folder import write_onnx
from megatron_patch.convert.source import ConvertError
from megatron_patch.generate import load_model
from megatron_patch.vision.images import Pictures
from tests.convert.samples import MemoryWeights, small_recipe, train_tokenizer
from tests.data_tools.vision.pictures import photograph
from tests.ranks import run_ranks

SIZE, TOKENS = 24, 9
SEEING = (
    "model.vision={image_size: 24, patch_size: 8, fit: FIT, hidden_size: 24, ffn_hidden_size: 40, num_layers: 2,"
    " num_attention_heads: 2, norm_epsilon: 1e-5, activation: quick_gelu, pixel_shuffle: 1, placeholder_id: 1}"
)
PROMPTS = {
    "text only": ("the quick brown fox", []),
    "one image": ("<s>\nthe lazy dog", [photograph(50, 30, 1)]),
    "two images": ("brown <s> and <s> fox", [photograph(20, 60, 2), photograph(33, 33, 3)]),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def ours(weights: MemoryWeights, prompts: list[tuple[list[int], np.ndarray]]) -> list[torch.Tensor]:
    """On a rank: logits [s, V] of each prompt, alone."""
    model = load_model(weights.recipe, weights.tensor, timedelta(minutes=1))
    logits = []
    with torch.no_grad():
        for ids, pixels in prompts:
            tokens = torch.tensor([ids])
            pictures = Pictures(torch.from_numpy(pixels), torch.nonzero(tokens[0] == 1)[:, 0]) if len(pixels) else None
            logits.append(model(tokens, pictures=pictures)[0])
    return logits


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_logits_are_those_of_stock_llava(fit: str, tokenizer: Path, tmp_path: Path) -> None:
    """Through the exported processor on their side, and through our own reading of images on ours."""
    weights = MemoryWeights(small_recipe(SEEING.replace("FIT", fit)))
    export(weights, tmp_path / "hf", "expanded", tokenizer)
    model, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path / "hf"), LlavaForConditionalGeneration)
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    inputs = {
        name: processor(images=images or None, text=text, return_tensors="pt")
        for name, (text, images) in PROMPTS.items()
    }
    assert {name: int((i["input_ids"] == 1).sum()) for name, i in inputs.items()} == {
        "text only": 0, "one image": TOKENS, "two images": 2 * TOKENS,
    }  # fmt: skip
    none = np.zeros((0, 3, SIZE, SIZE), np.uint8)
    prompts = [
        (inputs[name]["input_ids"][0].tolist(), np.stack([prepare(i, SIZE, fit) for i in images]) if images else none)
        for name, (_, images) in PROMPTS.items()
    ]
    expected = dict(zip(PROMPTS, run_ranks(1, ours, weights, prompts)[0], strict=True))
    together = processor(
        images=[images for _, images in PROMPTS.values() if images],
        text=[text for text, images in PROMPTS.values() if images],
        return_tensors="pt",
        padding=True,
    )
    assert together["attention_mask"][:, 0].tolist() == [0, 1], "the shorter one is padded on the left"
    with torch.no_grad():
        for name, one in inputs.items():
            difference = model(**one).logits[0] - expected[name]
            assert difference.norm() < 1e-5 * expected[name].norm(), name
        for logits, name in zip(model(**together).logits, ["one image", "two images"], strict=True):
            theirs = logits[-len(expected[name]) :]
            assert (theirs - expected[name]).norm() < 1e-5 * expected[name].norm(), f"{name}, in a batch"


def test_an_image_changes_the_answer(tokenizer: Path, tmp_path: Path) -> None:
    weights = MemoryWeights(small_recipe(SEEING.replace("FIT", "pad")))
    export(weights, tmp_path / "hf", "expanded", tokenizer)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    images = [Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")]
    logits = [model(**processor(images=[i], text="<s> fox", return_tensors="pt")).logits[0, -1] for i in images]
    assert (logits[0] - logits[1]).norm() > 0.01 * logits[0].norm()


def test_forms_that_would_lose_the_encoder_are_refused(tokenizer: Path, tmp_path: Path) -> None:
    weights = MemoryWeights(small_recipe(SEEING.replace("FIT", "pad")))
    with pytest.raises(ConvertError, match="exported with --form expanded"):
        export(weights, tmp_path / "hf", "shared", tokenizer)
    for write in (write_gguf, write_onnx):
        with pytest.raises(ValueError, match="exported with --form expanded"):
            write(weights, tmp_path / "file", tokenizer)
    shuffled = SEEING.replace("FIT", "pad").replace("pixel_shuffle: 1", "pixel_shuffle: 3")
    with pytest.raises(ConvertError, match="train with pixel_shuffle=1"):
        export(MemoryWeights(small_recipe(shuffled)), tmp_path / "hf", "expanded", tokenizer)
    assert not (tmp_path / "hf").exists() and not (tmp_path / "file").exists()
