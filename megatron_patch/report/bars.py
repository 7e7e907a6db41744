"""Rows side by side: a panel of horizontal bars for each quantity, the paper's gray and one's own blue."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure, SubFigure

Panel = tuple[str, Sequence[float | None]]
"""A quantity's title and its values, one a row; None where it is not known."""


def height(rows: int) -> float:
    """Inches that so many rows take."""
    return 0.9 + 0.32 * rows


def bars(figure: Figure | SubFigure, names: Sequence[str], is_paper: Sequence[bool], panels: Sequence[Panel]) -> None:
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (title, values) in zip(axes, panels, strict=True):
        colours = ["tab:gray" if paper else "tab:blue" for paper in is_paper]
        drawn = axis.barh(range(len(names)), [value or 0.0 for value in values], color=colours)
        axis.bar_label(
            drawn,
            ["-" if v is None else f"{v:,.0f}" if v >= 1000 else f"{v:.4g}" for v in values],
            fontsize=8,
            padding=2,
        )
        axis.set_yticks(range(len(names)), names, fontsize=9, parse_math=False)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.3)
        axis.set_xticks([])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0].invert_yaxis()
