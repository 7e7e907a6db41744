"""Weights & Biases. WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline and its other variables are the library's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import wandb

from megatron_patch.train.loggers.logger import RunOfService, numbers


class Run:
    """One run of the service through all attempts. Offline, each attempt leaves a folder for `wandb sync`."""

    def __init__(self, run: RunOfService) -> None:
        os.environ.setdefault("WANDB_PROJECT", "mobillama")
        os.environ.setdefault("WANDB_DIR", str(run.folder))
        # A folder is named by second and run: attempts that begin in one second would write into one.
        settings = wandb.Settings(
            console="off", disable_git=True, disable_code=True, x_sync_dir_suffix=str(os.getpid())
        )
        self._run = wandb.init(id=run.id, name=run.name, resume="allow", config=dict(run.config), settings=settings)
        self.step = run.done if self._run.offline else self._run.starting_step - 1

    def write(self, record: Mapping[str, Any]) -> None:
        """Records of one step become one row of the service; it takes no step a second time."""
        self._run.log(numbers(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()
