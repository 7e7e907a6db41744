"""What docs/devices.md tells people to type."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

DOCUMENT = Path(__file__).parents[2] / "docs" / "devices.md"


def blocks() -> list[str]:
    """Its code blocks, without their indentation."""
    found = re.findall(r"(?:^ {4,}\S.*\n(?:^ {4,}.*\n|\n(?= {4}))*)", DOCUMENT.read_text(), re.MULTILINE)
    return [textwrap.dedent(block).strip() for block in found]


def commands(beginning: str) -> list[str]:
    """The lines of its blocks and the cells of its tables that begin so, each once."""
    cells = re.findall(r"`([^`]+)`", DOCUMENT.read_text())
    lines = [line for block in blocks() for line in block.splitlines()]
    return list(dict.fromkeys(text for text in [*cells, *lines] if text.startswith(beginning)))
