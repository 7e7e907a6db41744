"""Scores against tokens: one small panel a benchmark that has scores and one for the average, a line a run."""

from __future__ import annotations

import fcntl
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from data_tools.files.durable import write_beside
from megatron_patch.evaluate.suite import BY_NAME
from megatron_patch.results import axis_unit, read_scores

_COLUMNS = 5


def plot(results: Path, image: Path) -> None:
    """Draws the checkpoints among a folder of results; the ending of `image` names its format.

    Processes that draw the same image wait for one another, so that the last one shows every result.

    Raises:
        ValueError: no checkpoint among them, no such format, or a folder is in the image's place.
    """
    if image.is_dir():
        raise ValueError(f"{image} is a folder, the name of an image is needed")
    with image.with_name(f".{image.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        figure = _figure(read_scores(results))
        with write_beside(image) as stream:
            figure.savefig(stream, format=image.suffix.removeprefix(".") or "png", dpi=120)


def _figure(found: list[dict[str, Any]]) -> Figure:
    checkpoints = [s for s in found if s["tokens"] is not None]
    if not checkpoints:
        raise ValueError("no scores of checkpoints to plot; run `python -m megatron_patch eval RUN` first")
    panels: list[tuple[str, str | None]] = [
        (b.column, b.name) for b in BY_NAME.values() if any(b.name in s["scores"] for s in checkpoints)
    ]
    panels += [("Average", None)] if any(s["average"] for s in checkpoints) else []
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(3 * _COLUMNS, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, sharex=True, squeeze=False).flat
    for unused in axes[len(panels) :]:
        unused.axis("off")
    unit, size = axis_unit(max(s["tokens"] for s in checkpoints))
    by_run = sorted(checkpoints, key=lambda s: (_run(s), s["tokens"]))
    for axis, (title, name) in zip(axes, panels, strict=False):
        for run, group in groupby(by_run, _run):
            points = [(s["tokens"] / size, c) for s in group if (c := _score(s, name)) is not None]
            errors = [c["stderr"] or 0.0 for _, c in points]
            values = [c["value"] for _, c in points]
            axis.errorbar([x for x, _ in points], values, errors, marker=".", elinewidth=0.6, label=run)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    figure.supxlabel(f"{unit} tokens", fontsize=10)
    figure.supylabel("percent (MME: points), with one standard error", fontsize=10)
    for text in axes[0].legend(fontsize=8).get_texts():
        text.set_parse_math(False)  # a run's name is no formula
    return figure


def _run(scores: dict[str, Any]) -> str:
    return str(scores["model"].rpartition("--")[0])


def _score(scores: dict[str, Any], name: str | None) -> dict[str, Any] | None:
    return scores["average"] if name is None else scores["scores"].get(name)
