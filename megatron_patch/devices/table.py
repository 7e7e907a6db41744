"""What was measured as one table, Markdown and CSV, the paper's Table 6 beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_patch.paper import TABLE_6


@dataclass(frozen=True)
class Measured:
    """A form of a model on so many threads. Losses in nats a token; None where not measured.

    Attributes:
        recipe: of the checkpoint.
        form: path as it was named.
        bits: of file a stored weight.
        roofline: share of the memory's bandwidth that its weights' reading takes: above 1 a cache gave part of them.
        same_tokens: share of greedy ids that the checkpoint would have chosen too.
        worst: largest difference of a log-probability from the checkpoint's.
        loss, checkpoint_loss: mean over the same ids.
    """

    recipe: str
    form: str
    runtime: str
    threads: int
    file_bytes: int
    bits: float
    resident_bytes: int
    load_seconds: float
    first_seconds: float
    tokens_per_second: float
    cpu_seconds: float
    joules: float | None
    bandwidth: float
    roofline: float
    same_tokens: float
    worst: float
    loss: float
    checkpoint_loss: float


_COLUMNS = (
    "Model", "Form", "Runtime", "Threads", "File MB", "Bits/weight", "Resident MB", "First token ms", "Tokens/s",
    "CPU s/token", "J/token", "Share of bandwidth", "Same tokens", "Worst log-prob.", "Loss", "Change of loss",
)  # fmt: skip


def as_csv(rows: Sequence[Measured]) -> str:
    """Every value as it was measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Measured)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def from_csv(text: str) -> list[Measured]:
    """Raises ValueError where it is no table of `device`."""
    kinds = {f.name: str(f.type) for f in fields(Measured)}
    rows = list(csv.DictReader(io.StringIO(text)))
    if not rows or any(row.keys() != kinds.keys() or None in row.values() for row in rows):
        raise ValueError(f"its columns are not {', '.join(kinds)}")
    convert: dict[str, Callable[[str], Any]] = {
        "str": str,
        "int": int,
        "float": float,
        "float | None": lambda value: float(value) if value else None,
    }
    return [Measured(**{name: convert[kinds[name]](value) for name, value in row.items()}) for row in rows]


def markdown(rows: Sequence[Measured], machine: str, texts: str) -> str:
    """The table, the paper's, and what the columns mean. `texts`: what the losses are of."""
    lines = [_line(_COLUMNS), "|---|---|---|" + "---:|" * (len(_COLUMNS) - 3)]
    lines += [_line(_cells(row)) for row in rows]
    bandwidth = {row.threads: row.bandwidth for row in rows}
    told = ", ".join(f"{value / 1e9:.1f} GB/s by {threads}" for threads, value in sorted(bandwidth.items()))
    lines += [
        "",
        f"- {machine}; memory read with {told} thread(s) in the same run. The share of bandwidth is tokens/s times the "
        "bytes of weights that a token reads (an FFN at each of its uses), over that.",
        f"- Loss: {texts}; its change is from the checkpoint's in fp32 on the same ids.",
        "- Same tokens: of the greedy ids, those that the checkpoint would have chosen after the same ids.",
        "- Resident: the process after decoding, its runtime and mapped files included. CPU s: all threads, decoding "
        "alone. J/token: of the processor's packages (RAPL), - where the machine does not tell.",
        "",
        "The paper's Table 6:",
        "",
        "| Platform | Model | Tokens/s | Memory MB | mAh for 1,000 tokens |",
        "|---|---|---:|---:|---:|",
    ]
    lines += [
        _line((r.platform, r.model, f"{r.tokens_per_second:g}", f"{r.memory_mb:g}", _or_dash(r.battery_mah, "g")))
        for r in TABLE_6
    ]
    return "\n".join(lines)


def _cells(r: Measured) -> tuple[str, ...]:
    return (
        r.recipe, r.form, r.runtime, str(r.threads), f"{r.file_bytes / 1e6:,.1f}", f"{r.bits:.2f}",
        f"{r.resident_bytes / 1e6:,.0f}", f"{1e3 * r.first_seconds:,.1f}", f"{r.tokens_per_second:,.2f}",
        f"{r.cpu_seconds:.4f}", _or_dash(r.joules, ".3f"), f"{r.roofline:.2f}", f"{r.same_tokens:.1%}",
        f"{r.worst:.2g}", f"{r.loss:.4f}", f"{r.loss - r.checkpoint_loss:+.4f}",
    )  # fmt: skip


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
