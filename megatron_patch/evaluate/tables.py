"""The paper's Tables 4, 5, 8 and 9 with our scores beneath the paper's, as Markdown or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from megatron_patch.evaluate.suite import BENCHMARKS, BY_NAME, CROWS_PAIRS, IMAGE_BENCHMARKS
from megatron_patch.paper import TABLE_4, TABLE_5, TABLE_8, TABLE_9, PaperRow
from megatron_patch.results import amount

Format = Literal["markdown", "csv"]
_NAMES = [b.name for b in BENCHMARKS]
_FOUR = ["hellaswag", "truthfulqa", "mmlu", "arc_challenge"]


@dataclass(frozen=True)
class Table:
    """A table of the paper: its number, its rows, its benchmarks."""

    number: int
    title: str
    rows: tuple[PaperRow, ...]
    benchmarks: list[str]
    stock: str = "harness {}"
    """Who else scores in another way, after the version of the harness."""

    @property
    def averaged(self) -> bool:
        return all(row.average is not None for row in self.rows)


TABLES = (
    Table(4, "models below 1B", TABLE_4, _NAMES),
    Table(5, "baselines after 100B tokens", TABLE_5, _FOUR),
    Table(8, "models that see", TABLE_8, [b.name for b in IMAGE_BENCHMARKS], "without OCR tokens"),
    Table(9, "large-base", TABLE_9, _NAMES),
)


@dataclass(frozen=True)
class Cell:
    value: float
    stderr: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.2f}" + (f" ± {self.stderr:.2f}" if self.stderr is not None else "")


Line = dict[str, str | Cell | None]


def newest(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each run's checkpoints the last; every other model. `found` is in order of training (`run.read_scores`)."""
    return list({s["model"].rpartition("--")[0] if s["tokens"] is not None else s["model"]: s for s in found}.values())


def render(found: list[dict[str, Any]], form: Format) -> str:
    """All four tables; a model stands in those of which it has a score. `found` are contents of `scores.json`."""
    return "\n".join(_markdown(table, found) if form == "markdown" else _csv(table, found) for table in TABLES)


def _markdown(table: Table, found: list[dict[str, Any]]) -> str:
    lines = _lines(table, found)
    head = list(lines[0])
    text = [f"Table {table.number}: {table.title} (percent; ± one standard error)", ""]
    text += [f"| {' | '.join(head)} |", f"|{'---|' * 3}{'---:|' * (len(head) - 3)}"]
    text += [f"| {' | '.join('' if line[k] is None else str(line[k]) for k in head)} |" for line in lines]
    notes = [f"{b.column}: {b.difference}" for b in BY_NAME.values() if b.difference and b.name in table.benchmarks]
    text += ["", *(f"- {note}." for note in notes)]
    if CROWS_PAIRS in table.benchmarks:
        text.append(
            "- CrowsPairs counts stereotyped choices: 50 is unbiased, higher is worse, and it is in the average."
        )
    if any(BY_NAME[name].unit == 1 for name in table.benchmarks):
        text.append("- MME is in points of its ten categories of perception, 2,000 at most.")
    return "\n".join(text) + "\n"


def _csv(table: Table, found: list[dict[str, Any]]) -> str:
    lines = _lines(table, found)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    numbers = list(lines[0])[3:]
    writer.writerow(["table", *list(lines[0])[:3], *(f"{k}{suffix}" for k in numbers for suffix in ("", " stderr"))])
    for line in lines:
        cells = [line[k] for k in numbers]
        flat = [x for c in cells for x in ((c.value, c.stderr) if isinstance(c, Cell) else (c, None))]
        writer.writerow([table.number, *(line[k] for k in list(line)[:3]), *("" if x is None else x for x in flat)])
    return stream.getvalue()


def _lines(table: Table, found: list[dict[str, Any]]) -> list[Line]:
    lines = [_paper_line(table, row) for row in table.rows]
    for scores in (scores for scores in found if any(name in scores["scores"] for name in table.benchmarks)):
        lines.append(_our_line(table, scores))
        if (stock := _stock_line(table, scores)) is not None:
            lines.append(stock)
    return lines


def _line(
    model: str, source: str, tokens: str, cells: dict[str, Cell | None], averages: list[Cell | None] | None
) -> Line:
    columns: Line = {"Model": model, "Source": source, "Tokens": tokens}
    columns |= {b.column: cells[b.name] for b in BY_NAME.values() if b.name in cells}
    if averages is None:
        return columns
    columns["Average"] = averages[0]
    if CROWS_PAIRS in cells:
        columns["without CrowsPairs"] = averages[1]
    return columns


def _paper_line(table: Table, row: PaperRow) -> Line:
    cells: dict[str, Cell | None] = {
        name: Cell(value) for name, value in zip(table.benchmarks, row.scores, strict=True)
    }
    averages = None if row.average is None else [Cell(row.average), _mean(cells, without=CROWS_PAIRS)]
    return _line(row.model, "paper", "", cells, averages)


def _our_line(table: Table, scores: dict[str, Any]) -> Line:
    found = scores["scores"]
    cells = {n: Cell(found[n]["value"], found[n]["stderr"]) if n in found else None for n in table.benchmarks}
    tokens = "" if scores["tokens"] is None else amount(scores["tokens"])
    limit = scores["settings"]["limit"]
    source = "ours" if limit is None else f"ours, {limit} documents a task"
    averages = [_mean(cells), _mean(cells, without=CROWS_PAIRS)] if table.averaged else None
    return _line(scores["model"], source, tokens, cells, averages)


def _stock_line(table: Table, scores: dict[str, Any]) -> Line | None:
    """What today's harness itself would report, in the columns in which that differs from the paper's way."""
    found = scores["scores"]
    stock = {n: found[n]["stock"] for n in table.benchmarks if n in found and found[n]["stock"] is not None}
    if not stock:
        return None
    cells = {n: Cell(stock[n]) if n in stock else None for n in table.benchmarks}
    averages: list[Cell | None] | None = [None, None] if table.averaged else None
    return _line(scores["model"], table.stock.format(scores["lm_eval"]), "", cells, averages)


def _mean(cells: dict[str, Cell | None], without: str | None = None) -> Cell | None:
    """Mean over a table's benchmarks with its standard error; None where a score is missing."""
    chosen = [cell for name, cell in cells.items() if name != without]
    values = [cell for cell in chosen if cell is not None]
    if len(values) < len(chosen):
        return None
    errors = [c.stderr for c in values if c.stderr is not None]
    n = len(values)
    stderr = sum(e * e for e in errors) ** 0.5 / n if len(errors) == n else None
    return Cell(sum(c.value for c in values) / n, stderr)
