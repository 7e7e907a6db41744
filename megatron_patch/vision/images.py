"""Images in the place of their placeholders: encoder, projector, and where their tokens go.

The encoder is `transformers`' own `CLIPVisionModel`: Megatron-Core's `CLIPViTModel` calls `.cuda()` while it is built
and has names and layouts of its own, and an export opens in `transformers`. The first pipeline stage runs it, and every
tensor-parallel rank whole: at the 0.8B's shape an image at CLIP-L/336 is 3.7 % of the work of a row of 2,048 tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from data_tools.vision.pictures import DEVIATION, MEAN
from megatron_patch.recipe import Vision
from megatron_patch.vision.shapes import clip_settings


class Pictures(NamedTuple):
    """The images of a micro-batch."""

    pixels: torch.Tensor
    """uint8 [n, 3, size, size], as `data_tools/vision/pictures.py` prepares them."""
    places: torch.Tensor
    """int64 [n * tokens]: where their tokens stand among the micro-batch's, its rows one after the other."""


class ImageTokens(torch.nn.Module):
    """Encoder and projector.

    Attributes:
        encoder: CLIP's vision transformer without the norm behind its last layer.
        projector: Linear-GELU-Linear.
    """

    def __init__(self, vision: Vision, hidden_size: int, dtype: torch.dtype) -> None:
        """`hidden_size` is the decoder's. Parameters are not yet filled."""
        super().__init__()
        self._vision = vision
        self.encoder = clip_encoder(vision).to(dtype)
        self.projector = Projector(vision.hidden_size * vision.pixel_shuffle**2, hidden_size).to(dtype)
        mean, deviation = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, DEVIATION))
        self.register_buffer("_mean", mean, persistent=False)
        self.register_buffer("_deviation", deviation, persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Of pixels uint8 [n, 3, size, size] the images' tokens [n, tokens, hidden], row by row of the image."""
        mean, deviation = self.get_buffer("_mean"), self.get_buffer("_deviation")
        scaled = ((pixels / 255 - mean) / deviation).to(self.projector.linear_1.weight.dtype)
        trained = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            patches = self.encoder(pixel_values=scaled).last_hidden_state[:, 1:]  # without the classification token
        return self.projector(shuffled(patches, self._vision.pixel_shuffle))

    def put(self, hidden: torch.Tensor, pictures: Pictures, first: int) -> torch.Tensor:
        """`hidden` [t, 1, h] of a micro-batch's tokens from `first` on, placeholders replaced by the images' tokens.

        Under sequence parallelism a rank has a part of the tokens, and places elsewhere are none of its own.
        """
        tokens = self(pictures.pixels).reshape(-1, 1, hidden.shape[-1])
        own = pictures.places - first
        elsewhere = (own < 0) | (own >= len(hidden))
        # Those of other ranks go behind the last row, which is dropped: picking them out would wait for the device.
        room = torch.cat([hidden, hidden.new_zeros(1, *hidden.shape[1:])])
        return room.index_copy(0, torch.where(elsewhere, len(hidden), own), tokens)[:-1]


class Projector(torch.nn.Module):
    """Linear-GELU-Linear from the encoder's width to the decoder's (LLaVA 1.5)."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = torch.nn.Linear(width, hidden_size)
        self.linear_2 = torch.nn.Linear(hidden_size, hidden_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.linear_2(torch.nn.functional.gelu(self.linear_1(patches)))


def shuffled(patches: torch.Tensor, factor: int) -> torch.Tensor:
    """Pixel shuffle (arXiv 1609.05158, the other way round): squares of factor x factor patches side by side as one.

    [n, grid * grid, w] to [n, (grid / factor)^2, w * factor^2].
    """
    if factor == 1:
        return patches
    n, count, width = patches.shape
    side = round(count**0.5) // factor
    squares = patches.view(n, side, factor, side, factor, width).transpose(2, 3)
    return squares.reshape(n, side * side, width * factor * factor)


def clip_encoder(vision: Vision) -> Any:
    """`CLIPVisionModel` of these settings, on torch's current default device, filled with whatever.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    encoder: Any = CLIPVisionModel._from_config(CLIPVisionConfig(**clip_settings(vision)), attn_implementation="sdpa")
    encoder.post_layernorm = torch.nn.Identity()  # of the classification token alone
    return encoder
