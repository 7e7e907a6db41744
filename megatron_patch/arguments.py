"""Numbers on the command line: what a verb cannot use is refused with the usage, before any work."""

from __future__ import annotations

import argparse
import math


def count(text: str) -> int:
    """A whole number of at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is given, a whole number of at least 1 is needed")
    return number


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    if not 0 < (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is given, a share above 0 and at most 1 is needed, e.g. 0.45")
    return number


def amount(text: str) -> float:
    """A finite number of at least 0."""
    if not 0 <= (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is given, a number of at least 0 is needed")
    return number
