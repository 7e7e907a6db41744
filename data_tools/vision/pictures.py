"""One encoded image -> its pixels as CLIP's image processor gives them, or the reason why it cannot be trained on.

What the data tools admit and what training decodes go through the same function, so an image that was admitted is the
image that is seen. Colours are converted as `CLIPImageProcessor` does (CMYK and palettes are resolved, what is
transparent stands on white) and EXIF's rotation is applied as `transformers.image_utils.load_image` does.
"""

from __future__ import annotations

import io
import warnings
from typing import Literal

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

Fit = Literal["pad", "crop"]
"""pad: to a square with the mean colour, as LLaVA does; crop: the middle of the shorter side's square, as CLIP does."""

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
"""Formats that are read, and their suffix in a shard. Others (EPS, say) would start programs of their own."""
_FORMATS = [name for name in SUFFIXES if name != "MPO"]  # which the reader of JPEG finds out
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Modes of 8 bits a channel at most; of the others `convert` would clip what is above 255 to white."""
MOST_PIXELS = 89_478_485
"""Pillow's own bound against decompression bombs: a quarter of a GB of RGB."""
MOST_BYTES = 64 << 20
LONGEST_STRIP = 100
"""Times a side may be longer than the other, with which it is enlarged to the encoder's size."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Of CLIP's training images, by channel (`OPENAI_CLIP_MEAN`)."""
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""The same: `OPENAI_CLIP_STD`."""

Image.init()  # else a format that is named may not be loaded
ImageFile.LOAD_TRUNCATED_IMAGES = False  # else what is missing is black, without a word


class BadPicture(ValueError):
    """An image that is not trained on, with the reason."""


def read_picture(content: bytes) -> tuple[Image.Image, str]:
    """The image as RGB, whole and upright, and the suffix of its format.

    Raises:
        BadPicture: empty, of no known format, truncated or damaged, animated or of several pages, too large, a strip,
            of more than 8 bits a channel, or of one colour all over.
    """
    if not content:
        raise BadPicture("an empty file")
    if len(content) > MOST_BYTES:
        raise BadPicture(f"{len(content):,} bytes; {MOST_BYTES:,} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF data and the like; pixels that are missing are errors
            return _read(content)
    except BadPicture:
        raise
    except Image.DecompressionBombError as error:
        raise BadPicture(f"a decompression bomb perhaps: {error}") from None
    except UnidentifiedImageError:
        raise BadPicture(f"none of {', '.join(SUFFIXES)}, or its header is damaged") from None
    except Exception as error:  # a decoder's errors are of any kind where the bytes are not what they should be
        raise BadPicture(f"damaged or cut short ({type(error).__name__}: {error})") from None


def _read(content: bytes) -> tuple[Image.Image, str]:
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        kind = str(image.format)
        _check_form(image, kind)
        image.verify()  # the checksums of PNG, which loading alone does not look at
    if kind in ("JPEG", "MPO") and b"\xff\xd9" not in content[-_TRAILER:]:
        raise BadPicture("damaged or cut short (no end of image)")  # libjpeg would fill what is missing with grey
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        image.load()
        upright = _on_white(ImageOps.exif_transpose(image))
    if all(band.getextrema() in _ONE_SHADE for band in upright.split()):
        raise BadPicture(
            f"every pixel is {upright.getpixel((0, 0))}: nothing to see, or what is left of a damaged file"
        )
    return upright, SUFFIXES[kind]


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, as `transformers.image_transforms.convert_to_rgb` makes it."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


_ONE_SHADE = {(shade, shade) for shade in range(256)}
_TRAILER = 1 << 16  # some cameras write notes behind the end


def _check_form(image: Image.Image, kind: str) -> None:
    width, height = image.size
    if min(width, height) < 1:
        raise BadPicture(f"{width} x {height} pixels")
    if width * height > MOST_PIXELS:
        raise BadPicture(f"{width:,} x {height:,} pixels, a decompression bomb perhaps; {MOST_PIXELS:,} are read")
    if max(width, height) > LONGEST_STRIP * min(width, height):
        raise BadPicture(f"a strip of {width:,} x {height:,} pixels; sides up to {LONGEST_STRIP} : 1 are read")
    if image.mode not in MODES:
        raise BadPicture(f"pixels of mode {image.mode}; {', '.join(MODES)} are read, of 8 bits a channel at most")
    frames = getattr(image, "n_frames", 1)
    if frames != 1 and kind != "MPO":  # whose further pictures are the same at other sizes
        raise BadPicture(f"{frames} frames: animated, or of several pages")


def prepare(picture: Image.Image, size: int, fit: Fit) -> np.ndarray:
    """uint8 [3, size, size], as `CLIPImageProcessor` (crop) and `LlavaImageProcessor` (pad) have it before scaling."""
    if fit == "pad" and picture.width != picture.height:
        side = max(picture.size)
        square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in MEAN))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    shorter = min(picture.size)
    width, height = (size if side == shorter else int(size * side / shorter) for side in picture.size)
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(pixels[top : top + size, left : left + size].transpose(2, 0, 1))
