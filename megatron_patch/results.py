"""Reads what evaluations left: one `scores.json` a model. Needs no harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_tools.files.plain_file import read_plain

SCORES_NAME = "scores.json"
TOKEN_UNITS = (("trillion", "T", 1e12), ("billion", "B", 1e9), ("million", "M", 1e6), ("thousand", "K", 1e3))


def amount(tokens: float) -> str:
    """Four digits and a unit: 3.495B."""
    unit, per = next(((letter, size) for _, letter, size in TOKEN_UNITS if tokens >= size), ("", 1.0))
    return f"{tokens / per:.4g}{unit}"


def axis_unit(most_tokens: float) -> tuple[str, float]:
    """Name and size of the unit for an axis that ends at `most_tokens`; at most a billion, as in the paper."""
    return next(((name, size) for name, _, size in TOKEN_UNITS[1:] if most_tokens >= size), ("thousand", 1e3))


def read_scores(output: Path) -> list[dict[str, Any]]:
    """Every model's `scores.json` under a folder of results, in order of training, then by name.

    Each with the name of its `folder`. Raises ValueError naming a file that is no result.
    """
    found = [{**_read(file), "folder": file.parent.name} for file in output.glob(f"*/{SCORES_NAME}")]
    return sorted(found, key=lambda s: (s["tokens"] is None, s["tokens"] or 0, s["model"]))


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_plain(file))
        return {key: content[key] for key in ("model", "tokens", "scores")} | content
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: not a result of `eval` ({error}); remove it and evaluate that model again, its tasks are kept"
        ) from None
