"""A run whose texts are markup: none of them becomes an element of the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from megatron_patch.recipe import load
from megatron_patch.report import seen
from megatron_patch.report.bars import bars
from megatron_patch.report.page import embed, render
from megatron_patch.report.read import Run, Steps

MARKUP = "<b onclick='x'>\u65e5\u672c & \"<script>"


def test_texts_of_a_run_are_text() -> None:
    recipe = load("recipes/demo.yaml").model_copy(update={"name": MARKUP})
    steps = Steps()
    steps.add({"step": 1, "loss": 2.0, "time": 10.0, "seconds": 1.0, "tokens": 99, "tokens_per_second": 99.0})
    milestone = dict.fromkeys(("name", "segments", "contents", "wall_time", "digest"), MARKUP)
    score = {"value": 1.0, "stderr": None, "stock": None}
    run = Run(
        folder=Path("runs") / MARKUP, recipe=recipe, status={"state": MARKUP, "reason": MARKUP}, steps=steps,
        milestones=[{**milestone, "step": "1", "tokens": "99"}],
        scores=[{"model": f"{MARKUP}--{MARKUP}", "tokens": 99, "scores": {"piqa": score}, "average": None}],
        mix=None, environment={"host": MARKUP},
    )  # fmt: skip
    page = Page(render(run, Path("runs/report.html")))
    assert "b" not in page.elements
    assert page.elements.count("script") == 2  # the data and the page's own
    assert page.text.count(MARKUP) > 5


def test_embedded_data_cannot_close_its_element() -> None:
    assert "<" not in embed({"text": f"</script>{MARKUP}"})
    assert json.loads(embed({"text": f"</script>{MARKUP}"}))["text"] == f"</script>{MARKUP}"


def test_names_and_answers_are_no_formulas(tmp_path: Path) -> None:
    """In matplotlib's text a pair of dollars is mathematics, and an error where that is none."""
    formula = r"costs $\frac$"
    figure = Figure()
    bars(figure, [formula, "paper"], [False, True], [("loss", [1.0, 2.0]), ("time", [None, 3.0])])
    figure.savefig(tmp_path / "bars.svg")
    assert formula in (tmp_path / "bars.svg").read_text()
    pixels = np.zeros((2, 3, 4, 4), np.uint8)
    seen.draw(pixels, [formula, "2"], [formula, formula], tmp_path / "answers.png")
    assert Image.open(tmp_path / "answers.png").width > 100


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data
