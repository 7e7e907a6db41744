"""Lines of a run for people."""

from __future__ import annotations

import sys


def note(text: str) -> None:
    """A line on standard error about something that is not a step."""
    print(text, file=sys.stderr, flush=True)
