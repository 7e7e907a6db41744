"""Images as `transformers`' own processors see them; what is damaged is named."""

from __future__ import annotations

import io
import random
import re

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_tools.vision.pictures import BadPicture, Fit, prepare, read_picture
from tests.data_tools.vision.pictures import bad, encoded, good, photograph

SIZE = 28
GOOD, BAD = good(), bad()


def stock(content: bytes, fit: Fit) -> np.ndarray:
    """What CLIP's or LLaVA's processor makes of the file, as `transformers.image_utils.load_image` opens it."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    settings = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    unscaled = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    opened = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    if fit == "crop":
        return CLIPImageProcessorPil(**settings)(opened, **unscaled)["pixel_values"][0]
    return LlavaImageProcessorPil(do_pad=True, **settings)(opened, **unscaled)["pixel_values"][0]


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_pixels_are_those_of_the_processor(fit: Fit) -> None:
    for name, content in {**GOOD, "large.png": encoded(photograph(230, 171), "png")}.items():
        ours = prepare(read_picture(content)[0], SIZE, fit)
        theirs = stock(content, fit)
        assert ours.dtype == np.uint8 and ours.shape == theirs.shape == (3, SIZE, SIZE), name
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1, name


def test_exif_turns_an_image() -> None:
    assert read_picture(GOOD["exif.jpg"])[0].size == (40, 60)
    assert read_picture(GOOD["plain.jpg"])[0].size == (60, 40)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_named(name: str) -> None:
    content, reason = BAD[name]
    with pytest.raises(BadPicture, match=re.escape(reason)):
        read_picture(content)


def test_a_thousand_damaged_images_are_named_or_read() -> None:
    """Headers and bodies overwritten at random, pieces cut out and ends cut off, of every format."""
    draw = random.Random(0)
    read = cut = 0
    for number in range(1_000):
        name = draw.choice(sorted(GOOD))
        content = bytearray(GOOD[name])
        damage = number % 4
        if damage == 0:
            content = content[: draw.randrange(len(content) - 2)]
        elif damage == 1:
            for _ in range(draw.randint(1, 8)):
                content[draw.randrange(min(64, len(content)))] = draw.randrange(256)
        elif damage == 2:
            at = draw.randrange(len(content))
            del content[at : at + draw.randint(1, 40)]
        else:
            for _ in range(draw.randint(1, 8)):
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        try:
            picture, _ = read_picture(bytes(content))
        except BadPicture as error:
            assert len(str(error)) > 10
            continue
        read += 1
        cut += damage == 0
        pixels = prepare(picture, SIZE, "pad") if max(picture.size) < 2_000 else np.arange(2)
        assert pixels.min() < pixels.max(), f"{name}, damage {number}: one colour all over"
    assert 100 < read < 700 and cut < 25, (read, cut)  # a cut within a trailer loses no pixel
