"""Lines of a run for people."""

from __future__ import annotations

import sys

from megatron_patch.launch import say


def note(text: str) -> None:
    """A line on standard error about something that is not a step."""
    say(text, sys.stderr)
