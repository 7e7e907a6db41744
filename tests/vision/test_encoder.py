"""Encoder and projector against `transformers`' own, from a folder of CLIP's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from data_tools.vision.pictures import prepare
from megatron_patch.recipe import RecipeError, Vision, load
from megatron_patch.vision.clip_folder import ClipFolder
from megatron_patch.vision.images import ImageTokens, Pictures, shuffled
from megatron_patch.vision.shapes import encoder_tensors, flops_per_image, vision_tensors
from tests.data_tools.vision.pictures import photograph

SHAPE = {
    "image_size": 24, "patch_size": 4, "fit": "crop", "hidden_size": 32, "ffn_hidden_size": 56, "num_layers": 3,
    "num_attention_heads": 4, "norm_epsilon": 1e-5, "activation": "quick_gelu", "pixel_shuffle": 1, "placeholder_id": 1,
}  # fmt: skip
VISION = Vision(**SHAPE)
CLIP = {  # the same in transformers' words, written out: our own translation is under test
    "image_size": 24, "patch_size": 4, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4,
    "num_attention_heads": 4, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
}  # fmt: skip


def clip_folder(folder: Path, kind: str = "vision", **changes: Any) -> tuple[Path, CLIPVisionModel]:
    """A CLIP of one layer more than run, drawn widely enough that each tensor matters."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(**{**CLIP, **changes})
    model: Any = CLIPVisionModel(config)
    if kind == "whole":
        small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 9}, vision_config=config.to_dict()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder, (model.vision_model if kind == "whole" else model).eval()


def loaded(folder: Path, vision: Vision = VISION) -> ImageTokens:
    found = ClipFolder(folder, vision)
    ours = ImageTokens(vision, 16, torch.float32)
    state = {tensor.name: found.tensor(tensor.name) for tensor in encoder_tensors(vision)}
    ours.encoder.load_state_dict(state, strict=True)
    return ours.eval()


@pytest.mark.parametrize(
    ("kind", "settings", "changes"),
    [
        ("vision", {}, {}),
        ("whole", {}, {}),
        ("vision", {"norm_epsilon": 0.05, "activation": "gelu"}, {"layer_norm_eps": 0.05, "hidden_act": "gelu"}),
    ],
)
def test_features_are_those_of_the_last_layer_but_one(
    tmp_path: Path, kind: str, settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    """From the pixels on: ours are bytes, which CLIP's processor scales and normalises."""
    folder, stock = clip_folder(tmp_path, kind, **changes)
    images = [photograph(50, 31, seed) for seed in range(3)]
    side = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    theirs = CLIPImageProcessorPil(**side)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = stock(theirs, output_hidden_states=True).hidden_states[-2][:, 1:]
        ours = loaded(folder, Vision(**{**SHAPE, **settings}))
        ours.projector = torch.nn.Identity()  # type: ignore[assignment]
        ours.projector.linear_1 = torch.nn.Linear(1, 1)
        pixels = torch.from_numpy(np.stack([prepare(image, 24, "crop") for image in images]))
        features = ours(pixels)
    assert features.shape == (3, 36, 32)
    assert (features - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_tensors_named_are_those_that_are_there() -> None:
    ours = ImageTokens(VISION, 16, torch.float32)
    named = {tensor.name.removeprefix("vision."): tensor.shape for tensor in vision_tensors(VISION, 16)}
    assert named == {name: tuple(parameter.shape) for name, parameter in ours.named_parameters()}


def test_pixel_shuffle_puts_neighbours_side_by_side() -> None:
    grid = torch.arange(16).view(1, 16, 1)  # 4 x 4 patches
    assert shuffled(grid, 2).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]]
    vision = Vision(**{**SHAPE, "pixel_shuffle": 2})
    assert vision.tokens == 9 and ImageTokens(vision, 16, torch.float32)(torch.zeros(2, 3, 24, 24)).shape == (2, 9, 16)


def test_tokens_go_where_their_placeholders_are_and_nowhere_else() -> None:
    ours = ImageTokens(VISION, 16, torch.float32)
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    hidden = torch.randn(100, 1, 16)
    places = torch.tensor([*range(5, 41), *range(60, 96)])
    put = ours.put(hidden, Pictures(pixels, places), 0)
    rest = [place for place in range(100) if place not in places.tolist()]
    assert torch.equal(put[rest], hidden[rest])
    assert torch.equal(put[places, 0], ours(pixels).view(72, 16))
    halves = [ours.put(part, Pictures(pixels, places), first) for first, part in ((0, hidden[:50]), (50, hidden[50:]))]
    assert torch.equal(torch.cat(halves), put)


def test_flops_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    ours = ImageTokens(VISION, 16, torch.float32)
    ours.encoder.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter:
        ours(torch.zeros(1, 3, 24, 24)).sum().backward()
    # the counter has no gradient of the pixels, which nobody asks for
    first = 2 * 36 * 32 * 3 * 16
    assert counter.get_total_flops() == pytest.approx(flops_per_image(VISION, 16) - first, rel=1e-3)


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    folder, _ = clip_folder(tmp_path / "clip")
    for change, said in (
        ({"hidden_size": 64}, r"embeddings\.class_embedding is \[32\], and model\.vision says \[64\]"),
        ({"ffn_hidden_size": 60}, r"mlp\.fc1\.weight is \[56, 32\]"),
        ({"num_layers": 5}, "4 layers, and model.vision runs 5"),
        ({"image_size": 28}, "image_size is 24"),
        ({"activation": "gelu"}, "hidden_act is quick_gelu"),
        ({"norm_epsilon": 1e-6}, "layer_norm_eps is 1e-05"),
        ({"num_attention_heads": 8}, "num_attention_heads is 4"),
    ):
        with pytest.raises(RecipeError, match=said):
            ClipFolder(folder, Vision(**{**SHAPE, **change}))
    weights = load_file(folder / "model.safetensors")
    missing = {name: value for name, value in weights.items() if "layers.2.mlp.fc2.bias" not in name}
    save_file(missing, folder / "model.safetensors")
    with pytest.raises(RecipeError, match=r"no tensor .*layers\.2\.mlp\.fc2\.bias"):
        ClipFolder(folder, VISION)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(RecipeError, match="cannot be read"):
        ClipFolder(folder, VISION)
    with pytest.raises(RecipeError, match=r"config\.json cannot be read"):
        ClipFolder(tmp_path / "nowhere", VISION)


def test_the_recipes_encoder_is_clip_l_at_336() -> None:
    vision = load("recipes/mobillama_v.yaml", []).model.vision
    assert vision is not None and vision.tokens == 576
    with torch.device("meta"):
        large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        whole = CLIPVisionModel(CLIPVisionConfig(image_size=336, patch_size=14, **large))
    assert sum(p.numel() for p in whole.parameters()) == 303_507_456  # openai/clip-vit-large-patch14-336's vision part
    theirs = {name: tuple(p.shape) for name, p in whole.named_parameters()}
    ours = {tensor.name: tensor.shape for tensor in encoder_tensors(vision)}
    unlike = {name for name in theirs if not name.startswith(("encoder.layers.23.", "post_layernorm."))} ^ set(ours)
    assert not unlike and all(theirs[name] == shape for name, shape in ours.items())
