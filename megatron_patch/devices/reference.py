"""The checkpoint that forms were exported from, in our own model and fp32: what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from megatron_patch import launch
from megatron_patch.devices.runtimes import of_labels
from megatron_patch.generate import load_model
from megatron_patch.parallel import device
from megatron_patch.train.checkpoint.reader import open_checkpoint

_PATIENCE = timedelta(hours=1)


class Reference:
    """A checkpoint's logits, on this process's device.

    Attributes:
        recipe: of the checkpoint, but in fp32.
    """

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError where it is damaged."""
        launch.setup_environment()
        device.use(0)
        with open_checkpoint(folder) as checkpoint:
            self.recipe = checkpoint.recipe.model_copy(update={"precision": "fp32"})
            self._model = load_model(self.recipe, checkpoint.tensor, _PATIENCE)

    def log_probs(self, row: Sequence[int]) -> list[float]:
        """Natural log-probability of each id but the first."""
        return of_labels(self._logits(row)[:-1], row[1:])

    def chosen_alike(self, prompt: Sequence[int], continued: Sequence[int], eos: int) -> int:
        """How many of the `continued` ids are the checkpoint's most likely ones, `eos` left out, after those before."""
        logits = self._logits([*prompt, *continued])[len(prompt) - 1 : -1]
        logits[:, eos] = -np.inf
        return int((logits.argmax(-1) == np.array(continued)).sum())

    @torch.no_grad()
    def _logits(self, ids: Sequence[int]) -> np.ndarray:
        logits: np.ndarray = self._model(torch.tensor([list(ids)], device=device.current()))[0].float().cpu().numpy()
        return logits
