"""Requests to stop or to save, from a signal, the clock or the wall-time budget of any rank.

A rank never acts on a request alone: its number travels with the loss in the step's one world-wide sum, so that all
ranks read the same answer after the same step. Import this module first and call `hold`: until the first step a signal
is only remembered. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from types import FrameType

# The sum is fp32, exact below 2^24: two counts of ranks and two bits that rank 0 alone sets.
_TERM, _USR1, _SAVE, _FIRST = 1, 1 << 11, 1 << 22, 1 << 23
MAX_RANKS = _USR1 - 1

_NUMBERS = {signal.SIGTERM: _TERM, signal.SIGINT: _TERM, signal.SIGHUP: _TERM, signal.SIGUSR1: _USR1}
_received: set[int] = set()
_moments: dict[int, float] = {}  # when each of them came first
# Seconds for which a rank with nothing to save still waits for others after a signal: they may be about to come, and
# one step makes an orderly end. SIGUSR1 comes minutes before a time limit, the others seconds before the kill.
_WAITS = {signal.SIGUSR1: 60.0}
_SHORT_WAIT = 2.0
STARTED = time.monotonic()
# Seconds within which one Ctrl-C may arrive twice, from the terminal and from torchrun.
_ECHO = 1.0


def hold() -> None:
    """From now on SIGTERM, SIGUSR1, SIGHUP (the terminal is gone) and Ctrl-C are remembered and end no process.

    Repeated ones do no harm, but for a second Ctrl-C: it ends the process at once (KeyboardInterrupt). What `nohup`
    has the process ignore stays ignored.
    """
    for number in _NUMBERS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _remember)
    signal.signal(signal.SIGINT, _interrupt)


def _remember(number: int, _: FrameType | None) -> None:
    _received.add(number)
    _moments.setdefault(number, time.monotonic())


def ends_waiting() -> str | None:
    """The signal that a rank which waits for others obeys now; None where none came, or only a moment ago."""
    now = time.monotonic()
    for number, moment in list(_moments.items()):
        if now - moment >= _WAITS.get(signal.Signals(number), _SHORT_WAIT):
            return signal.Signals(number).name
    return None


_interrupted: float | None = None  # moment of the first Ctrl-C


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _interrupted
    now = time.monotonic()
    if _interrupted is None:
        _interrupted = now
        _remember(number, frame)
        if os.environ.get("RANK", "0") == "0":
            # Not print: the signal may have come in the middle of one.
            with contextlib.suppress(OSError):
                os.write(2, b"Ctrl-C: a checkpoint is saved after the step under way; Ctrl-C again ends at once\n")
    elif now - _interrupted > _ECHO:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class Decision:
    """What all ranks do after a step."""

    stop: str | None  # the reason to stop, or None
    save: bool  # a restart checkpoint is due by the clock


class Requests:
    """This rank's part of the number, and what the sum means."""

    def __init__(self, rank: int, world_size: int, interval_minutes: float, wall_minutes: float) -> None:
        """Minutes of 0 switch the clock or the budget off. ValueError above 2,047 ranks: the sum would not be exact."""
        if world_size > MAX_RANKS:
            raise ValueError(f"{world_size} ranks: requests of at most {MAX_RANKS} add up exactly in fp32")
        self._first, self._world_size = rank == 0, world_size
        self._interval, self._wall = 60 * interval_minutes, 60 * wall_minutes
        self._last_save = time.monotonic()
        self._reason = ""

    def stop(self, reason: str) -> None:
        """From now on this rank, the first one, asks all to stop."""
        self._reason = reason

    def number(self) -> float:
        """What this rank asks for now."""
        # A copy: the next signal may come in the middle of the loop.
        asked = sum({_NUMBERS[signal.Signals(number)] for number in _received.copy()})
        if self._first:
            now = time.monotonic()
            asked += _SAVE * bool(self._interval and now - self._last_save >= self._interval)
            asked += _FIRST * bool(self._reason or (self._wall and now - STARTED >= self._wall))
        return float(asked)

    def saved(self) -> None:
        """A restart checkpoint was begun: the clock starts anew."""
        self._last_save = time.monotonic()

    def decide(self, total: float) -> Decision:
        """What the sum over all ranks asks for."""
        asked = int(total)
        ends = "SIGHUP" if signal.SIGHUP in _received else "SIGTERM or Ctrl-C"  # ranks are sent the same one
        reasons = [
            f"{name} on {count} of {self._world_size} ranks"
            for name, count in ((ends, asked % _USR1), ("SIGUSR1", asked % _SAVE // _USR1))
            if count
        ]
        if asked & _FIRST:
            reasons.append(self._reason or f"run.wall_minutes {self._wall / 60:g} used up")
        return Decision(stop=", ".join(reasons) or None, save=bool(asked & _SAVE))
