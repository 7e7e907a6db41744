"""One self-contained HTML file of a run: text in the page's own source, curves drawn by the page's own script."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from data_tools.dataset.format import TABLE_2_BILLION_TOKENS
from data_tools.files.bounded_json import is_number
from megatron_patch.evaluate.suite import BY_NAME
from megatron_patch.model import counts
from megatron_patch.report.read import Run
from megatron_patch.report.series import Axes, Thinned, curve
from megatron_patch.results import amount, axis_unit
from megatron_patch.run.pace import Pace
from megatron_patch.run.planned import against_plan, measured_energy

_ASSETS = Path(__file__).parent
_FOLDED_ROWS = 12
"""A longer table opens on demand."""
_CURVES = (  # title, unit, key of the log, times, logarithmic, from zero
    ("Gradient norm", "before clipping", "grad_norm", 1.0, True, False),
    ("Learning rate", "", "learning_rate", 1.0, False, True),
    ("Tokens per second", "of the job", "tokens_per_second", 1.0, False, True),
    ("MFU", "percent of the dense bf16 peak", "mfu", 100.0, False, True),
    ("Memory", "GB, highest on rank 0", "memory", 1e-9, False, True),
)


def render(run: Run, page: Path) -> str:
    """The HTML; links to checkpoints are relative to where `page` will lie."""
    axes = _axes(run)
    charts, figures = _charts(run, axes)
    score_charts, score_figures = _score_charts(run, first=len(charts))
    data = {
        "charts": charts + score_charts,
        "restarts": [
            {"from": axes.at(r.time - r.lost, at := run.tokens_of(r.step)), "to": axes.at(r.time, at)}
            for r in run.restarts
        ],
    }
    sections = [
        _header(run),
        _section("Training", _grid(figures) or "<p>No step has been logged yet.</p>", _choice(axes)),
        _section("Restarts", _restarts(run)),
        _scores(run, score_figures),
        _section("Data mix against the paper's Table 2", _mix(run)),
        _section("Milestones", _milestones(run, page)),
        _section("Recipe and environment", _details(run)),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{escape(run.recipe.name)}</title>
<style>{(_ASSETS / "page.css").read_text()}</style>
</head>
<body><main>
{"".join(sections)}
</main>
<script type="application/json" id="data">{embed(data)}</script>
<script>{(_ASSETS / "page.js").read_text()}</script>
</body></html>
"""


def embed(data: Any) -> str:
    """JSON that stands inside a script element: with "<" escaped, no text in it can close the element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _section(title: str, body: str, beside: str = "") -> str:
    return f'<section><div class="title"><h2>{escape(title)}</h2>{beside}</div>{body}</section>\n'


def _scores(run: Run, figures: Sequence[str]) -> str:
    if not run.scores:
        hint = f"<p>None yet: <code>python -m megatron_patch eval {escape(str(run.folder))} --watch</code></p>"
        return _section("Scores against tokens", hint)
    unit = axis_unit(max(s["tokens"] for s in run.scores))[0]
    beside = f'<span class="choice">percent, along {unit} tokens</span>'
    return _section("Scores against tokens", _grid(figures, "small") + _score_table(run), beside)


def _grid(figures: Sequence[str], kind: str = "") -> str:
    return f'<div class="charts {kind}">{"".join(figures)}</div>' if figures else ""


def _choice(axes: Axes) -> str:
    return (
        f'<span class="choice">along <label><input type="radio" name="axis" value="time" checked> {axes.time_unit}'
        f'</label><label><input type="radio" name="axis" value="tokens"> {axes.token_unit}</label></span>'
    )


def _axes(run: Run) -> Axes:
    if not run.steps:
        return Axes.of(0.0, 0.0, 0.0)
    first, last = run.steps.first, run.steps.last
    start = first["time"] - first["seconds"]
    return Axes.of(start, last["time"] - start, last["tokens"])


def _header(run: Run) -> str:
    status, last = run.status, run.steps.last
    state, reason = str(status.get("state", "not started")), str(status.get("reason") or "")
    total = status.get("total_steps") or run.recipe.run.steps or 0
    step = last.get("step", 0)
    tiles = [
        ("Step", f"{step:,}" + (f" <small>of {total:,}</small>" if total else "")),
        ("Tokens", amount(last.get("tokens", 0))),
        ("Loss", _loss(last.get("loss"))),
        ("Held-out loss", _loss(run.last_held_out)),
        ("Tokens per second", f"{_lately(run, 'tokens_per_second'):,.0f}" if run.steps else "-"),
        ("MFU", f"{_lately(run, 'mfu'):.1%}" if last.get("mfu") is not None else "- <small>peak unknown</small>"),
        ("Restarts", f"{len(run.restarts)} <small>{_span(sum(r.lost for r in run.restarts))} lost</small>"),
    ]
    if is_number(status.get("withheld")) and status["withheld"]:
        tiles.append(("Updates withheld", f"{status['withheld']:,}"))
    if state in ("running", "starting") and is_number(status.get("eta_seconds")):
        tiles.append(("Left", _span(status["eta_seconds"])))
    model = run.recipe.model
    parameters = counts.parameters(model)
    sharing = "one FFN for all layers" if model.shared_ffn else "an FFN in each layer"
    return f"""<header><h1>{escape(run.recipe.name)}</h1>
<span class="state {escape(state)}">{escape(state)}</span><span class="soft">{escape(reason)}</span>
</header>
<p class="soft">{parameters.unique:,} parameters: {model.num_layers} layers of {model.hidden_size}, {sharing}
({model.ffn_hidden_size}). {escape(_when(run))}</p>
{_planned(run)}<progress max="{max(total, 1)}" value="{step}" aria-label="steps done"></progress>
<dl class="tiles">{"".join(f'<div class="tile"><dt>{escape(k)}</dt><dd>{v}</dd></div>' for k, v in tiles)}</dl>
"""


def _planned(run: Run) -> str:
    """What was planned with `plan --save`, the share of it that the last steps reach, and what the GPUs drew."""
    if not run.steps:
        return ""
    pace = Pace.of(run.folder / "log.jsonl")
    beside = against_plan(run.folder, _lately(run, "tokens_per_second"), run.status.get("ranks"), pace.rates)
    said = {"Planned": beside, "Energy": measured_energy(run.folder, pace)}
    return "".join(f'<p class="soft">{name}: {escape(text)}.</p>\n' for name, text in said.items() if text)


def _when(run: Run) -> str:
    if not run.steps:
        return ""
    first, last = run.steps.first["time"] - run.steps.first["seconds"], run.steps.last["time"]
    return f"{_utc(first)} to {_utc(last)} ({_span(last - first)})."


def _charts(run: Run, axes: Axes) -> tuple[list[dict[str, Any]], list[str]]:
    if not run.steps:
        return [], []
    curves = run.steps.curves
    loss = [curve("training", curves["loss"], axes)]
    loss += [curve("held out", run.held_out, axes)] if run.held_out.last else []
    charts: list[dict[str, Any]] = [{"curves": loss, "log": True}]
    titles = [("Loss", "nats a token")]
    for title, unit, key, scale, log, zero in _CURVES:
        drawn = curve("", curves[key], axes, scale)
        if drawn["values"]:
            charts.append({"curves": [drawn], "log": log, "zero": zero})
            titles.append((title, unit))
    return charts, [_figure(i, *title) for i, title in enumerate(titles)]


def _score_charts(run: Run, first: int) -> tuple[list[dict[str, Any]], list[str]]:
    charts: list[dict[str, Any]] = []
    figures: list[str] = []
    axes = Axes.of(0.0, 0.0, max((s["tokens"] for s in run.scores), default=0.0))
    for title, name in [("Average of nine", None), *((b.column, b.name) for b in BY_NAME.values())]:
        points = Thinned()
        for s in run.scores:
            if score := _score(s, name):
                points.add(0.0, s["tokens"], score["value"])
        if points.last:
            charts.append({"curves": [curve("", points, axes)], "axis": "tokens"})
            figures.append(_figure(first + len(figures), title, ""))
    return charts, figures


def _score(scores: dict[str, Any], name: str | None) -> dict[str, Any] | None:
    return scores["average"] if name is None else scores["scores"].get(name)


def _figure(number: int, title: str, unit: str) -> str:
    return (
        f'<figure class="card" data-chart="{number}"><div class="head"><h3>{escape(title)}</h3>'
        f'<span class="values"></span></div><svg role="img" aria-label="{escape(title)}"></svg>'
        f"<figcaption>{escape(unit)}</figcaption></figure>"
    )


def _restarts(run: Run) -> str:
    if not run.restarts:
        return "<p>None: every step was made in one go.</p>"
    whole = run.steps.last["time"] - run.steps.first["time"]
    lost = sum(r.lost for r in run.restarts)
    share = f"{lost / whole:.1%}" if whole else "0%"
    head = f"<p>{len(run.restarts)}, which cost {_span(lost)}, {share} of the run (shaded above).</p>"
    rows = [(_utc(r.time), f"{r.step:,}", _span(r.lost)) for r in run.restarts]
    return head + _table(("First step began", "Went on from step", "Lost"), rows, numbers={1, 2})


def _score_table(run: Run) -> str:
    names = [b for b in BY_NAME.values() if any(b.name in s["scores"] for s in run.scores)]
    rows = []
    for s in run.scores:
        cells = [s["average"], *(_score(s, b.name) for b in names)]
        rows.append((escape(s["model"].rpartition("--")[2]), amount(s["tokens"]), *(_percent(c) for c in cells)))
    return _table(
        ("Milestone", "Tokens", "Average", *(b.column for b in names)), rows, numbers=set(range(1, 3 + len(names))),
        escaped=True,
    )  # fmt: skip


def _percent(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    return f"{score['value']:.2f}" + (f" <small>± {score['stderr']:.2f}</small>" if score["stderr"] is not None else "")


def _mix(run: Run) -> str:
    if run.mix is None:
        return f"<p>The data set {escape(str(run.recipe.data.folder))} is not within reach of this report.</p>"
    ours, paper = sum(run.mix.values()), sum(TABLE_2_BILLION_TOKENS.values())
    rows = []
    for source in TABLE_2_BILLION_TOKENS if set(run.mix) <= set(TABLE_2_BILLION_TOKENS) else run.mix:
        share, theirs = 100 * run.mix.get(source, 0) / ours, 100 * TABLE_2_BILLION_TOKENS.get(source, 0) / paper
        bars = (
            f'<div class="bars"><span><i class="bar" style="width:{share:.2f}%;background:var(--one)"></i></span>'
            f'<span><i class="bar" style="width:{theirs:.2f}%;background:var(--two)"></i></span></div>'
        )
        in_paper = f"{theirs:.2f} %" if theirs else "-"
        rows.append((escape(source), bars, f"{share:.2f} %", in_paper, f"{run.mix.get(source, 0):,}"))
    return _table(
        ("Source", "", '<i class="key" style="background:var(--one)"></i>Here',
         '<i class="key" style="background:var(--two)"></i>Table 2', "Rows"),
        rows, numbers={2, 3, 4}, escaped=True,
    )  # fmt: skip


def _milestones(run: Run, page: Path) -> str:
    if not run.milestones:
        return "<p>None yet.</p>"
    folder = os.path.relpath(run.folder / "checkpoints", page.parent)
    rows = [
        (
            f'<a href="{escape(folder)}/{escape(m["name"])}/">{escape(m["name"])}</a>',
            f"{int(m['step']):,}", amount(int(m["tokens"])), escape(m["segments"]), escape(m["contents"]),
            escape(m["wall_time"][:16].replace("T", " ")), f"<code>{escape(m['digest'][:12])}</code>",
        )
        for m in run.milestones
    ]  # fmt: skip
    return _table(
        ("Checkpoint", "Step", "Tokens", "Segments", "Holds", "Written (UTC)", "Digest"),
        rows, numbers={1, 2}, escaped=True,
    )  # fmt: skip


def _details(run: Run) -> str:
    environment = {k: v for k, v in run.environment.items() if k != "recipe"}
    text = json.dumps(environment, indent=1) if environment else "not recorded yet"
    return (
        f"<details><summary>Recipe, resolved</summary><pre>{escape(run.recipe.to_yaml())}</pre></details>"
        f"<details><summary>Environment of the last attempt</summary><pre>{escape(text)}</pre></details>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: set[int], *, escaped: bool = False) -> str:
    text = str if escaped else escape
    kind = [' class="n"' if i in numbers else "" for i in range(len(head))]
    top = "".join(f"<th{k}>{text(h)}</th>" for k, h in zip(kind, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{text(c)}</td>" for k, c in zip(kind, row, strict=True)) + "</tr>" for row in rows
    )
    whole = f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'
    return whole if len(rows) <= _FOLDED_ROWS else f"<details><summary>All {len(rows)}</summary>{whole}</details>"


def _loss(value: float | None) -> str:
    """A dash before the first, and for one that was not finite."""
    return "-" if value is None else f"{value:.4f}"


def _lately(run: Run, key: str) -> float:
    """Mean over the last 50 steps."""
    values = [s[key] for s in run.steps.lately if s.get(key) is not None]
    return float(sum(values) / len(values))


def _span(seconds: float) -> str:
    """The two largest units: 4 d 6 h."""
    left, parts = round(seconds), []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def _utc(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")
