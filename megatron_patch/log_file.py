"""Reading RUN/log.jsonl: one JSON object a line, each with its `step` (train/metrics.py writes it)."""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Records in the order of the log, none where there is no file; a last line still being written is left out.

    A line that a full or failing disk damaged is left out too, and said on standard error: the others still tell.
    """
    if not path.exists():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                operator.index(record["step"])
            except (ValueError, KeyError, TypeError):
                print(f"{path}, line {number}: damaged, no record of a step; left out", file=sys.stderr)
            else:
                yield record
