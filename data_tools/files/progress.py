"""How far a stage is: a bar with rate and time left on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LOG_INTERVAL_S = 30.0


class Progress:
    """Counts work of a known total; use as a context manager.

    Attributes:
        done: work so far, in `unit`.
    """

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self._bar = (
            tqdm(total=total, unit=unit, unit_scale=True, desc=name, file=sys.stderr) if sys.stderr.isatty() else None
        )
        self._started = self._printed = time.monotonic()
        self._before = 0

    def __enter__(self) -> Progress:
        self._started = self._printed = time.monotonic()
        self._before = self.done  # finished by an earlier run: no part of this run's rate
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._print()

    def advance(self, count: int) -> None:
        """Adds finished work."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._printed > LOG_INTERVAL_S:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        seconds = max(self._printed - self._started, 1e-9)
        rate = (self.done - self._before) / seconds
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate and self.done < self.total else ""
        share = 100 * self.done / self.total if self.total else 100
        print(
            f"{self.name}: {tqdm.format_sizeof(self.done)}{self.unit} ({share:.0f} %)"
            f" at {tqdm.format_sizeof(rate)}{self.unit}/s{left}",
            file=sys.stderr,
            flush=True,
        )
