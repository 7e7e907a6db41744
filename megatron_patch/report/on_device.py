"""What `device` measured beside the paper's Table 6, which its Figure 1 draws: speed, memory and energy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.files.bounded_json import read_bounded
from megatron_patch.devices.table import from_csv
from megatron_patch.paper import TABLE_6
from megatron_patch.report.bars import Panel
from megatron_patch.report.read import ReportError

_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class DeviceRow:
    """A model on a device. `energy` in joules a token, `battery` in mAh for 1,000; None where not known."""

    model: str
    source: str
    runtime: str
    tokens_per_second: float
    memory_mb: float
    energy: float | None
    battery: float | None

    @property
    def is_paper(self) -> bool:
        return self.source == "paper"


def device_rows(files: Sequence[Path]) -> list[DeviceRow]:
    """The paper's rows, then those of each CSV file of `device`. Raises ReportError where a file is none."""
    rows = [
        DeviceRow(r.model, "paper", r.platform, r.tokens_per_second, r.memory_mb, None, r.battery_mah) for r in TABLE_6
    ]
    for file in files:
        try:
            measured = from_csv(read_bounded(file, _MOST_BYTES).decode())
            rows += [
                DeviceRow(
                    m.recipe, f"{file.name}: {Path(m.form).name}", f"{m.runtime}, {m.threads} thread(s)",
                    m.tokens_per_second, m.resident_bytes / 1e6, m.joules, None,
                )
                for m in measured
            ]  # fmt: skip
            for m in measured:
                for value in (m.tokens_per_second, m.resident_bytes, m.joules or 0.0):
                    if not 0 <= value < math.inf:
                        raise ValueError(f"{value} among its figures")
        except OSError as error:
            raise ReportError(f"{file}: cannot be read ({error.strerror}); `device --csv` writes it") from None
        except ValueError as error:
            raise ReportError(f"{file}: no table of `device --csv` ({error})") from None
    return rows


def device_markdown(rows: Sequence[DeviceRow]) -> str:
    lines = [
        "| Model | Source | Runtime | Tokens/s | Memory MB | J/token | mAh for 1,000 tokens |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        energy, battery = ("-" if v is None else f"{v:g}" for v in (row.energy, row.battery))
        lines.append(
            f"| {row.model} | {row.source} | {row.runtime} | {row.tokens_per_second:,.4g} | {row.memory_mb:,.0f} | "
            f"{energy} | {battery} |"
        )
    return "\n".join(lines)


def device_panels(rows: Sequence[DeviceRow]) -> tuple[list[str], list[Panel]]:
    """Names of the rows, and the quantities."""
    names = [f"{row.model}, {row.runtime if row.is_paper else row.source}" for row in rows]
    return names, [
        ("Tokens/s on the device", [row.tokens_per_second for row in rows]),
        ("Memory on the device (MB)", [row.memory_mb for row in rows]),
        ("J a token", [row.energy for row in rows]),
        ("mAh for 1,000 tokens", [row.battery for row in rows]),
    ]
