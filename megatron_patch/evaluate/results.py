"""Reads what evaluations left: one `scores.json` a model. Needs no harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCORES_NAME = "scores.json"


def read_scores(output: Path) -> list[dict[str, Any]]:
    """Every model's `scores.json` under a folder of results, in order of training, then by name.

    Each with the name of its `folder`.
    """
    found = [{**json.loads(file.read_bytes()), "folder": file.parent.name} for file in output.glob(f"*/{SCORES_NAME}")]
    return sorted(found, key=lambda s: (s["tokens"] is None, s["tokens"] or 0, s["model"]))
