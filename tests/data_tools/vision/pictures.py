"""Images for tests: a photograph-like one in every form that a folder of images may hold."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def photograph(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """Smooth colours and some noise."""
    draw = np.random.RandomState(seed)
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 2, height))
    waves = [128 + 100 * np.sin(a * x + b * y + c) for a, b, c in draw.rand(3, 3) * 4]
    pixels = np.stack(waves, -1) + draw.randint(-20, 20, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str, **settings: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **settings)
    return stream.getvalue()


def claiming(png: bytes, width: int, height: int) -> bytes:
    """A PNG whose header says that it is of that size."""
    header = png[12:16] + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def rotated_by_exif(image: Image.Image) -> bytes:
    """A JPEG that a camera held sideways would write: EXIF says that it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "jpeg", exif=exif, quality=95)


def good() -> dict[str, bytes]:
    """In every form that is read."""
    image = photograph()
    alpha = Image.fromarray(np.linspace(0, 255, 60 * 40).reshape(40, 60).astype(np.uint8))
    transparent = image.copy()
    transparent.putalpha(alpha)
    paletted = image.quantize(16)
    return {
        "plain.jpg": encoded(image, "jpeg"),
        "plain.png": encoded(image, "png"),
        "lossy.webp": encoded(image, "webp"),
        "still.gif": encoded(image, "gif"),
        "plain.bmp": encoded(image, "bmp"),
        "plain.tiff": encoded(image, "tiff"),
        "cmyk.jpg": encoded(image.convert("CMYK"), "jpeg"),
        "cmyk.tiff": encoded(image.convert("CMYK"), "tiff"),
        "palette.png": encoded(paletted, "png"),
        "palette_with_hole.png": encoded(paletted, "png", transparency=3),
        "alpha.png": encoded(transparent, "png"),
        "alpha.webp": encoded(transparent, "webp", lossless=True),
        "gray.png": encoded(image.convert("L"), "png"),
        "gray_alpha.png": encoded(transparent.convert("LA"), "png"),
        "bits.png": encoded(image.convert("1"), "png"),
        "exif.jpg": rotated_by_exif(image),
        "several.mpo": encoded(image, "mpo", save_all=True, append_images=[photograph(30, 20)]),
        "progressive.jpg": encoded(image, "jpeg", progressive=True),
        "tall.png": encoded(photograph(9, 80), "png"),
        "square.png": encoded(photograph(33, 33), "png"),
        "one_pixel_high.png": encoded(photograph(30, 1), "png"),
    }


def bad() -> dict[str, tuple[bytes, str]]:
    """What is refused, and a word of the reason."""
    image, other = photograph(), photograph(seed=1)
    jpeg, png = encoded(image, "jpeg"), encoded(image, "png")
    wide = np.arange(60 * 40, dtype=np.uint16).reshape(40, 60) * 20
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 1
    return {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"<html>404 Not Found</html>", "none of JPEG"),
        "vector.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "none of JPEG"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "cut short"),
        "cut_by_two_bytes.jpg": (jpeg[:-2], "cut short"),
        "cut.png": (png[: len(png) // 2], "cut short"),
        "cut.webp": (encoded(image, "webp")[:400], "cut short"),
        "cut.gif": (encoded(image, "gif")[:1500], "cut short"),
        "cut.bmp": (encoded(image, "bmp")[:900], "cut short"),
        "cut.tiff": (encoded(image, "tiff")[:900], "cut short"),
        "one_bit_flipped.png": (bytes(flipped), "cut short"),
        "animated.gif": (encoded(image, "gif", save_all=True, append_images=[other]), "2 frames"),
        "animated.png": (encoded(image, "png", save_all=True, append_images=[other]), "2 frames"),
        "animated.webp": (encoded(image, "webp", save_all=True, append_images=[other]), "2 frames"),
        "pages.tiff": (encoded(image, "tiff", save_all=True, append_images=[other, image]), "3 frames"),
        "sixteen_bits.png": (encoded(Image.fromarray(wide), "png"), "mode I;16"),
        "float.tiff": (encoded(Image.fromarray(wide.astype(np.float32)), "tiff"), "mode F"),
        "bomb.png": (claiming(png, 30_000, 30_000), "bomb perhaps"),
        "smaller_bomb.png": (claiming(png, 10_000, 10_000), "10,000 x 10,000"),
        "no_width.png": (claiming(png, 0, 40), "damaged"),
        "strip.png": (encoded(photograph(900, 2), "png"), "strip of 900 x 2"),
        "black.png": (encoded(Image.new("RGB", (9, 9)), "png"), "every pixel is (0, 0, 0)"),
        "clear.png": (encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), "png"), "every pixel is (255, 255, 255)"),
    }
