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

    Skipping has an end. After `skip_limit` updates withheld in a row the run stops, unless their losses show that the
    data have changed for good: several, all of them finite, and closer to each other than to what was usual. Then they
    are what the next losses are compared with.
    """

    def __init__(
        self, policy: Watchdog, window: Iterable[float] = (), in_a_row: Iterable[float | None] = (), withheld: int = 0
    ) -> None:
        """`window`, `in_a_row` and the number of updates `withheld` so far are those that a checkpoint carries on."""
        self._policy = policy
        self._window = deque(window, maxlen=policy.spike_window)
        self._in_a_row = list(in_a_row)
        self.withheld = withheld
        self.action: Action = "go on"
        self.reason = ""
        self.at_limit = False
        """Whether `stop` follows from `skip_limit`."""

    @property
    def window(self) -> list[float]:
        """Losses of the last steps that were trained on."""
        return list(self._window)

    @property
    def in_a_row(self) -> list[float | None]:
        """Losses of the steps withheld since the last one that was not; None where a step was not finite."""
        return list(self._in_a_row)

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
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if not finite:
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
            self._in_a_row.clear()
            return
        self._in_a_row.append(loss if finite else None)
        self.withheld += 1
        if self.action == "skip" and len(self._in_a_row) >= self._policy.skip_limit:
            self._end_skipping()

    def _end_skipping(self) -> None:
        alike = [loss for loss in self._in_a_row if loss is not None]
        count = len(self._in_a_row)
        nearby = len(alike) == count > 1 and max(alike) - min(alike) <= min(alike) - statistics.fmean(self._window)
        if nearby:
            self.reason += f"; the {count} withheld in a row are alike, so the data have changed: the next are applied"
            self._window = deque(alike, maxlen=self._policy.spike_window)
            self._in_a_row.clear()
        else:
            self.action = "stop"
            self.at_limit = True
            in_a_row = f"{count} updates in a row were" if count > 1 else "an update was"
            self.reason += f"; {in_a_row} withheld (watchdog.skip_limit)"


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
