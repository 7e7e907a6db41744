"""What is wrong with a step: not finite, a spike of the loss, far slower than usual; the recipe says what follows."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Literal, NamedTuple

from megatron_patch.recipe import Watchdog

Action = Literal["go on", "log", "skip", "stop"]


class Ceiling(NamedTuple):
    """A loss more than `margin` above `mean` is too high."""

    mean: float
    margin: float


class LossWatch:
    """Judges a step by its loss and gradient norm. Equal input, so equal verdict, on every rank.

    The device withholds the update of a step that is not finite, or whose loss is above `ceiling` (train/step.py);
    what else follows is decided here, once the host has read the numbers.
    """

    def __init__(self, policy: Watchdog, window: Iterable[float] = ()) -> None:
        """`window` holds the losses that a checkpoint carries on."""
        self._policy = policy
        self._window = deque(window, maxlen=policy.spike_window)
        self.action: Action = "go on"
        self.reason = ""

    @property
    def window(self) -> list[float]:
        return list(self._window)

    @property
    def ceiling(self) -> Ceiling | None:
        """Above it the next step's update is withheld; None: no loss is too high."""
        return self._spike() if self._policy.spike in ("skip", "stop") else None

    def _spike(self) -> Ceiling | None:
        if len(self._window) < self._policy.spike_window:
            return None
        return Ceiling(statistics.fmean(self._window), self._policy.spike_zscore * statistics.pstdev(self._window))

    def judge(self, loss: float, grad_norm: float, applied: bool) -> None:
        """Leaves in `action` and `reason` what to do about a step; a loss that was trained on joins the window."""
        self.action, self.reason = "go on", ""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.action, self.reason = self._policy.non_finite, f"loss {loss}, gradient norm {grad_norm}"
        elif self._policy.spike != "ignore" and (usual := self._spike()) and loss - usual.mean > usual.margin:
            self.action = self._policy.spike
            self.reason = (
                f"loss {loss:.4f} is more than {self._policy.spike_zscore:g} standard deviations of "
                f"{usual.margin / self._policy.spike_zscore:.4f} above the mean {usual.mean:.4f} of the last "
                f"{len(self._window)} steps"
            )
        if applied:
            self._window.append(loss)


class SlowWatch:
    """Finds steps whose computation on this rank took far longer than the median of the last ones.

    What counts is the time up to the reduction of gradients, where ranks wait for each other: a slow rank exceeds its
    own median, those that wait for it do not. Tensor- and pipeline-parallel neighbours wait earlier and exceed it too.
    """

    _WINDOW = 64
    _LEAST = 16  # before that the median says little

    def __init__(self, factor: float) -> None:
        """`factor` of 0 switches it off."""
        self._factor = factor
        self._seconds: deque[float] = deque(maxlen=self._WINDOW)

    def check(self, seconds: float) -> str | None:
        """What is wrong with a step that took `seconds`, or None."""
        median = statistics.median(self._seconds) if len(self._seconds) >= self._LEAST else math.inf
        self._seconds.append(seconds)
        if self._factor and seconds > self._factor * median:
            return f"computed {seconds:.2f} s, {seconds / median:.1f} times the median of {median:.2f} s"
        return None
