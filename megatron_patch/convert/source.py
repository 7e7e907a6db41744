"""What conversion and evaluation ask of a set of weights, whatever holds them."""

from __future__ import annotations

from typing import Protocol

import torch

from megatron_patch.recipe import Recipe

MOST_PROVENANCE = 1 << 20
"""Bytes of what an export records of where its weights come from: thousands of times what it writes."""


class ConvertError(ValueError):
    """Weights that cannot be read or written: names the file, what was expected and what to do."""


class WeightsSource(Protocol):
    """Whole-model weights and where they come from: a checkpoint, or an imported Hugging Face folder.

    Attributes:
        recipe: the resolved recipe of the run.
        step: optimizer steps taken.
        samples: rows consumed.
        tokens: labels trained on.
        digest: identifies the weights.
        data_digest: digest of the data set's manifest; None where it is not known.
    """

    @property
    def recipe(self) -> Recipe: ...
    @property
    def step(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def digest(self) -> str: ...
    @property
    def data_digest(self) -> str | None: ...

    def tensor(self, name: str) -> torch.Tensor:
        """The whole-model tensor of that name (`megatron_patch.model.parameters`), on the CPU."""
        ...
