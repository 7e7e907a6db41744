"""TensorBoard's event files, RUN/tensorboard."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_patch.train.loggers.logger import numbers
from megatron_patch.train.note import note


def is_installed() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


class EventFiles:
    """Given up where they cannot be written: log.jsonl holds all."""

    def __init__(self, folder: Path, done: int) -> None:
        """Points of later steps than `done`, which are made again, are hidden from the reader."""
        from torch.utils.tensorboard import SummaryWriter

        self._events: Any = SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        # Event files hold 32-bit floats: counts of rows, tokens and bytes would be rounded.
        drawn = [(key, value) for key, value in numbers(record).items() if isinstance(value, float)]
        self._draw(lambda events: [events.add_scalar(key, value, record["step"]) for key, value in drawn])

    def close(self) -> None:
        self._draw(lambda events: events.close())

    def _draw(self, what: Callable[[Any], object]) -> None:
        if self._events is not None:
            try:
                what(self._events)
            except OSError as error:
                note(f"{self._events.log_dir}: cannot be written ({error}); no more event files in this attempt")
                self._events = None
