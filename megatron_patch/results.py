"""Reads what evaluations left: one `scores.json` a model. Needs no harness."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from data_tools.files.bounded_json import is_number, load_bounded

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

    Each with the name of its `folder`. A file that is no result is named on standard error and left out: the others
    still tell.
    """
    found = []
    for file in sorted(output.glob(f"*/{SCORES_NAME}")):
        try:
            found.append({**_read(file), "folder": file.parent.name})
        except (ValueError, OSError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            print(
                f"{file}: not a result of `eval` ({said}); left out: remove it and evaluate that model again, its "
                "tasks are kept",
                file=sys.stderr,
            )
    return sorted(found, key=lambda s: (s["tokens"] is None, s["tokens"] or 0, s["model"]))


def _read(file: Path) -> dict[str, Any]:
    """Raises ValueError where a field that tables and curves are made of is missing or of another type."""
    content = load_bounded(file)
    if not isinstance(content, dict):
        raise ValueError("not an object")
    result: dict[str, Any] = {"digest": None, "settings": {"limit": None}, "lm_eval": "", "average": None, **content}
    for name, kind in (("model", str), ("scores", dict), ("settings", dict), ("lm_eval", str)):
        if not isinstance(result.get(name), kind):
            raise ValueError(f"{name} is missing or of another type")
    if not isinstance(result["digest"], str | None):
        raise ValueError("digest is of another type")
    if not (result.get("tokens") is None or (is_number(result["tokens"]) and result["tokens"] >= 0)):
        raise ValueError("tokens is not a number")
    result["settings"].setdefault("limit", None)
    for name, score in {**result["scores"], "average": result["average"]}.items():
        if score is None and name == "average":
            continue
        if not isinstance(score, dict) or not is_number(score.get("value")):
            raise ValueError(f"the score {str(name)[:40]} has no value")
        for part in ("stderr", "stock"):
            if not (score.setdefault(part, None) is None or is_number(score[part])):
                raise ValueError(f"the score {str(name)[:40]} has a {part} that is no number")
    return result
