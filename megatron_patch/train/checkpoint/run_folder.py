"""The checkpoints of one run: which there are, which are kept, which is the newest.

    RUN/checkpoints/step_00000120/    a restart point: full, the last K are kept
    RUN/checkpoints/ckpt_007/         a milestone: kept for ever; weights alone, every M-th full
    RUN/checkpoints/checkpoints.csv   the milestones
    RUN/checkpoints/latest            name of the newest restart point, for people and scripts; `train` looks itself
    RUN/checkpoints/NAME.broken       set aside: by a resume that fell back to an earlier one, or a damaged table

Only rank 0 changes anything here.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from data_tools.durable import write_whole
from megatron_patch.recipe import Recipe
from megatron_patch.train.checkpoint.format import MARKER_NAME, CheckpointError, read_index
from megatron_patch.train.checkpoint.write import remove

LATEST_NAME = "latest"
TABLE_NAME = "checkpoints.csv"


@dataclass(frozen=True)
class Milestone:
    """A line of `checkpoints.csv`."""

    name: str
    step: int
    samples: int
    tokens: int
    segments: str  # segments whose rows were trained on since the milestone before, "first-last"
    wall_time: str  # UTC, ISO 8601
    contents: str
    digest: str


class RunFolder:
    """RUN/checkpoints of a run under its recipe's retention."""

    def __init__(self, recipe: Recipe) -> None:
        self.path = recipe.run_folder / "checkpoints"
        self._keep = recipe.checkpoint.keep

    def restart_point(self, step: int) -> Path:
        return self.path / f"step_{step:08d}"

    def milestone(self, number: int) -> Path:
        return self.path / f"ckpt_{number:03d}"

    def restart_points(self) -> list[Path]:
        """Finished ones, newest first."""
        found = [p for p in self._folders() if re.fullmatch(r"step_\d{8,}", p.name) and (p / MARKER_NAME).exists()]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step_")), reverse=True)

    def candidates(self) -> list[Path]:
        """Folders that training may go on from, newest first: restart points and full milestones."""
        by_step = [(int(p.name.removeprefix("step_")), 1, p) for p in self.restart_points()]
        for folder in self._folders():
            if re.fullmatch(r"ckpt_\d{3,}", folder.name) and (folder / MARKER_NAME).exists():
                try:
                    index = read_index(folder)
                except (CheckpointError, OSError):
                    continue  # whoever opens that milestone is told; the run goes on from another
                if index.contents == "full":
                    by_step.append((index.state.step, 0, folder))
        return [folder for _, _, folder in sorted(by_step, reverse=True)]

    def sweep(self) -> list[str]:
        """Remove what was never finished; returns its names. Call it only while nothing is being written."""
        swept = []
        for folder in self._folders():
            unfinished = folder.name.endswith(".partial") or (
                re.fullmatch(r"(step|ckpt)_\d+", folder.name) and not (folder / MARKER_NAME).exists()
            )
            if unfinished:
                remove(folder)
                swept.append(folder.name.removeprefix(".").removesuffix(".partial"))
        return swept

    def set_aside(self, folder: Path) -> None:
        """Keep a broken checkpoint for inspection, out of the way of later ones."""
        aside = folder.with_name(f"{folder.name}.broken")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)

    def point_latest(self) -> None:
        """Make `latest` name the newest restart point; without one there is no `latest`."""
        points = self.restart_points()
        if points:
            write_whole(self.path / LATEST_NAME, f"{points[0].name}\n".encode())
        else:
            (self.path / LATEST_NAME).unlink(missing_ok=True)

    def retain(self) -> list[str]:
        """After a restart point is durable: point `latest` to it, delete those beyond the last K; returns their names.

        The new one was read back and compared after its flush, so the newest verified one is always among those kept.
        """
        self.point_latest()
        surplus = self.restart_points()[self._keep :]
        for old in surplus:
            remove(old)
        return [old.name for old in surplus]

    def record(self, milestone: Milestone) -> None:
        """Write a milestone's line, in place of an earlier one of its name (a rewound run passes it again).

        A table that someone damaged is set aside, its whole lines are kept: no training ends for it.
        """
        table = self.path / TABLE_NAME
        names = [f.name for f in fields(Milestone)]
        rows: list[dict[str, str]] = []
        if table.exists():
            found = list(csv.DictReader(io.StringIO(table.read_text(errors="replace"))))
            rows = [row for row in found if row.keys() == set(names) and str(row["step"]).isdecimal()]
            if len(rows) < len(found) or not found:
                table.replace(table.with_name(f"{TABLE_NAME}.broken"))
        rows = [row for row in rows if row["name"] != milestone.name]
        rows.append({key: str(value) for key, value in asdict(milestone).items()})
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: int(row["step"])))
        write_whole(table, text.getvalue().encode())

    def _folders(self) -> list[Path]:
        return [p for p in self.path.iterdir() if p.is_dir()] if self.path.is_dir() else []
