"""Settings of a model that sees: its encoder, and how images become tokens of the decoder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_patch.recipe.section import Section


class Vision(Section):
    """A CLIP vision transformer and the projector behind it (LLaVA 1.5's, docs/errata.md).

    The decoder sees `tokens` of them for an image, where `tokens` placeholders stand in the row.
    """

    image_size: int = Field(gt=0, description="Pixels of the square that an image becomes.")
    patch_size: int = Field(gt=0, description="Pixels of a patch's side.")
    fit: Literal["pad", "crop"] = Field(
        description="pad: to a square with the mean colour (LLaVA); crop: the square in the middle (CLIP)."
    )
    hidden_size: int = Field(gt=0, description="Width of the encoder.")
    ffn_hidden_size: int = Field(gt=0, description="Inner width of its MLPs.")
    num_layers: int = Field(
        gt=0, description="Layers that run: LLaVA takes what the last but one of CLIP-L's 24 gives, so 23."
    )
    num_attention_heads: int = Field(gt=0, description="Heads of its attention.")
    norm_epsilon: float = Field(gt=0, description="Of its layer norms.")
    activation: Literal["quick_gelu", "gelu"] = Field(description="Of its MLPs: x sigmoid(1.702 x) in OpenAI's CLIP.")
    pixel_shuffle: int = Field(
        ge=1, description="Patches in a row and in a column that become one token; 1: each is a token of its own."
    )
    placeholder_id: int = Field(ge=1, description="The id that stands for an image's tokens in rows; no text has it.")

    @property
    def grid(self) -> int:
        """Patches in a row of an image."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of one image."""
        return (self.grid // self.pixel_shuffle) ** 2

    @model_validator(mode="after")
    def _buildable(self) -> Vision:
        for what, whole, part in (
            ("image_size / patch_size", self.image_size, self.patch_size),
            ("image_size / patch_size / pixel_shuffle", self.grid, self.pixel_shuffle),
            ("hidden_size / num_attention_heads", self.hidden_size, self.num_attention_heads),
        ):
            if whole % part:
                raise ValueError(f"{what} = {whole / part:g} is not a whole number")
        return self
