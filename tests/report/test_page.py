"""The report of a real run in a real browser, and of runs that have hardly begun."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from megatron_patch.__main__ import main
from tests.report.browser import Browser


@pytest.fixture(scope="module")
def page(run: Path, evaluations: Path) -> Path:
    assert main(["report", str(run), "--evaluations", str(evaluations)]) == 0
    return run / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if shutil.which("chromedriver") is None:
        pytest.skip("no chromedriver: the page is not looked at in a browser (Debian: chromium-driver)")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_opens_without_error_and_draws(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width, dark=dark)
    assert browser.console() == []
    assert browser.script("return document.documentElement.scrollWidth") <= width
    drawn = browser.script(
        "return [...document.querySelectorAll('figure[data-chart]')].map(f => [f.querySelector('h3').textContent,"
        " f.querySelectorAll('path').length, f.querySelector('path').getTotalLength()])"
    )
    titles = [title for title, _, _ in drawn]
    assert titles[:4] == ["Loss", "Gradient norm", "Learning rate", "Tokens per second"]
    assert titles[-10:-8] == ["Average of nine", "HellaSwag"]
    assert [paths for title, paths, _ in drawn if title == "Loss"] == [2]  # training and held out
    assert all(length > 50 for title, _, length in drawn)
    image = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    assert image.size == (width, 1000)
    colours = sorted(image.getcolors(1 << 20) or [], reverse=True)
    background = (18, 22, 28) if dark else (246, 247, 249)
    assert background in [colour for _, colour in colours[:2]]
    assert len(colours) > 50


def test_mfu_and_memory_of_a_gpu_and_restarts_stand_on_the_same_axis(
    browser: Browser, run: Path, evaluations: Path, tmp_path: Path
) -> None:
    """The run's own log with what a GPU would have added."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    lines = []
    for line in (run / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss" in record:
            record |= {"mfu": 0.41, "memory": 23_000_000_000 + record["step"]}
        lines.append(json.dumps(record) + "\n")
    (copy / "log.jsonl").write_text("".join(lines))
    assert main(["report", str(copy), "--evaluations", str(evaluations)]) == 0
    browser.open(copy / "report.html", 1400)
    charts = browser.script(
        "return [...document.querySelectorAll('figure[data-chart]')].filter(f => f.dataset.own === 'false').map(f =>"
        " [f.querySelector('h3').textContent, f.querySelector('.values').textContent,"
        "  f.querySelector('.restart')?.getAttribute('x1'), f.querySelector('.lost')?.getAttribute('width')])"
    )
    assert [title for title, *_ in charts] == [
        "Loss", "Gradient norm", "Learning rate", "Tokens per second", "MFU", "Memory",
    ]  # fmt: skip
    assert [value for _, value, *_ in charts][-2:] == ["41", "23"]  # percent, GB
    places = {(place, width) for _, _, place, width in charts}
    assert len(places) == 1, "the restart stands at one place on every chart, and its cost is drawn"
    ((_, width),) = places
    assert float(width) > 0
    assert browser.console() == []


def test_an_error_in_the_page_is_seen(browser: Browser, page: Path, tmp_path: Path) -> None:
    """So that an empty console says something."""
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("figures.forEach(draw);", "figures.forEach(paint);", 1))
    browser.open(broken, 1400)
    browser.script("dispatchEvent(new Event('resize'))")
    frame = "return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
    assert browser.script(frame)
    assert "paint is not defined" in "".join(browser.console())


def test_crosshair_and_axis(browser: Browser, page: Path) -> None:
    browser.open(page, 1400)
    values = "return document.querySelector('figure .values').textContent"
    last = browser.script(values)
    browser.script(
        "const svg = document.querySelector('figure svg'), box = svg.getBoundingClientRect();"
        "svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + 60, clientY: box.top + 20}))"
    )
    frame = "return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
    assert browser.script(frame)
    assert browser.script(values) != last
    assert browser.script("return document.querySelectorAll('.cross').length") >= 4  # on every chart of the time axis
    browser.script("document.querySelector('input[value=tokens]').click()")
    assert browser.script(frame)
    assert browser.script("return document.querySelectorAll('.cross').length") == 0
    assert browser.script(values) == last
    assert browser.console() == []


def test_is_one_file_that_asks_for_nothing(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!checkpoints/|data:,)[^"']*""", text)
    assert not re.findall(r"url\(|@import|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text
    for name in re.findall(r'href="(checkpoints/[^"]*)"', text):
        assert (page.parent / name / "COMPLETE").is_file()


def test_says_what_happened(page: Path) -> None:
    text = page.read_text()
    assert '<span class="state completed">completed</span>' in text
    assert "Restarts</dt><dd>1 <small>" in text
    assert "<td>wikipedia</td>" in text
    assert "ckpt_002" in text
    assert "global_batch_size: 8" in text
    assert "&quot;python&quot;" in text


def test_text_of_a_run_is_never_markup(run: Path, tmp_path: Path, evaluations: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("recipe.yaml", "log.jsonl"):
        shutil.copy(run / name, copy)
    status = json.loads((run / "status.json").read_text())
    status |= {"state": "failed", "reason": "</script><script>alert(1)</script>"}
    (copy / "status.json").write_text(json.dumps(status))
    plan = {"tokens_per_second": 1e12, "ranks": status["ranks"], "hardware": "<script>alert(2)</script>"}
    (copy / "plan.json").write_text(json.dumps(plan))
    assert main(["report", str(copy), "--evaluations", str(evaluations)]) == 0
    text = (copy / "report.html").read_text()
    assert "alert(1)" in text
    assert "Planned: 1,000,000,000,000 tokens/s on " in text and "alert(2)" in text and "% of it reached" in text
    assert "<script>alert" not in text


def test_a_run_in_progress_and_one_that_has_not_begun(run: Path, tmp_path: Path, browser: Browser) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copy(run / "recipe.yaml", copy)
    (copy / "status.json").write_text('{"state": "starting", "total_steps": 60}')
    assert main(["report", str(copy)]) == 0
    assert "No step has been logged yet" in (copy / "report.html").read_text()
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (copy / "log.jsonl").write_text("".join(lines[:9]) + lines[9][:25])  # the last line is being written
    (copy / "status.json").write_text('{"state": "running", "total_steps": 60, "eta_seconds": 4000.0}')
    assert main(["report", str(copy), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "1 h 6 min" in text
    assert "9 <small>of 60" in text
    for page in (copy / "report.html", tmp_path / "page.html"):
        browser.open(page, 400)
        assert browser.console() == []


def test_refusals(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no recipe.yaml in it; name a run's folder" in capsys.readouterr().err
    assert main(["report", str(run), str(run), "--output", str(tmp_path / "x.html")]) == 2
    assert "--output names one file" in capsys.readouterr().err
