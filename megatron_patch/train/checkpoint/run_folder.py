"""The checkpoints of one run: which there are, which are kept, which is the newest.

    RUN/checkpoints/step_00000120/       a restart checkpoint: full, the last K are kept
    RUN/checkpoints/ckpt_007/            a milestone: kept for ever; weights alone, every M-th full
    RUN/checkpoints/ckpt_step_00061036/  a milestone without a number: of a last step with which no interval ends, or
                                         where another interval has given its number to another step
    RUN/checkpoints/ckpt_007.earlier/    a milestone whose step was done again, otherwise, after the run had gone back
    RUN/checkpoints/checkpoints.csv      the milestones
    RUN/checkpoints/latest               name of the newest restart checkpoint, for people; `train` looks itself
    RUN/checkpoints/NAME.broken          set aside: a resume fell back to an earlier one, or it is not what it is called
                                         (a second time: of a milestone NAME.broken_2, else in place of the first)

Only rank 0 changes anything here.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from pathlib import Path

from data_tools.files.durable import write_whole
from megatron_patch.recipe import Recipe
from megatron_patch.run import milestones
from megatron_patch.run.milestones import TABLE_NAME, Milestone
from megatron_patch.train.checkpoint.format import (
    MARKER_NAME,
    CheckpointError,
    Marker,
    read_index,
    read_marker,
    said_digest,
)
from megatron_patch.train.checkpoint.write import remove

LATEST_NAME = "latest"
_CHECKPOINT = re.compile(r"(step|ckpt|ckpt_step)_\d+")
_MILESTONE = re.compile(r"ckpt_\d{3,}|ckpt_step_\d{8,}")
_EARLIER, _BROKEN = "earlier", "broken"


class RunFolder:
    """RUN/checkpoints of a run under its recipe's retention."""

    def __init__(self, recipe: Recipe) -> None:
        self.path = recipe.run_folder / "checkpoints"
        self._keep = recipe.checkpoint.keep

    def restart_checkpoint(self, step: int) -> Path:
        return self.path / f"step_{step:08d}"

    def milestone(self, number: int) -> Path:
        return self.path / f"ckpt_{number:03d}"

    def milestone_at(self, step: int) -> Path:
        """A milestone's folder where a number could be another step's: a run that goes on for longer gives the next."""
        return self.path / f"ckpt_step_{step:08d}"

    def milestones(self) -> list[Path]:
        """Finished ones, by name."""
        return sorted(p for p in self._folders() if _MILESTONE.fullmatch(p.name) and _is_finished(p))

    def restart_checkpoints(self) -> list[Path]:
        """Finished ones, newest first."""
        found = [p for p in self._folders() if re.fullmatch(r"step_\d{8,}", p.name) and _is_finished(p)]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step_")), reverse=True)

    def candidates(self) -> list[Path]:
        """Folders that training may go on from, newest first: restart checkpoints and full milestones.

        The table says which milestones hold weights alone, as far as their markers name the content that it speaks of:
        a whole run has 350 of these, and their indexes stay unread unless nothing else is there.
        """
        weights = {row["name"]: row["digest"] for row in self.recorded() if row["contents"] == "weights"}
        return self._candidates(weights) or self._candidates({})

    def _candidates(self, weights: dict[str, str]) -> list[Path]:
        by_step = [(int(p.name.removeprefix("step_")), 1, p) for p in self.restart_checkpoints()]
        for folder in self.milestones():
            if folder.name in weights and said_digest(folder) == weights[folder.name]:
                continue
            try:
                index = read_index(folder)
            except CheckpointError:
                continue  # opening that milestone raises the error; the run goes on from another
            if index.contents == "full":
                by_step.append((index.state.step, 0, folder))
        return [folder for _, _, folder in sorted(by_step, reverse=True)]

    def sweep(self) -> list[str]:
        """Remove what was never finished, set aside what is no checkpoint; returns what was done, a line each.

        Call it only while nothing is being written.
        """
        recorded = {row["name"] for row in self.recorded()}
        done = self._mend_table()
        for path in sorted(self.path.iterdir()) if self.path.is_dir() else ():
            name, is_folder, named = path.name, path.is_dir(), _CHECKPOINT.fullmatch(path.name)
            if (named and path.is_file()) or (name == LATEST_NAME and is_folder and not path.is_symlink()):
                done.append(f"{name}: is no {'file' if is_folder else 'folder'}; set aside as {self.set_aside(path)}")
            elif named and is_folder and not _is_finished(path) and name in recorded:
                done.append(f"{name}: its {MARKER_NAME} was lost; set aside as {self.set_aside(path)}")
            elif is_folder and (name.endswith(".partial") or (named and not _is_finished(path))):
                remove(path)
                done.append(f"{name.removeprefix('.').removesuffix('.partial')}: was never finished; removed")
        return done

    def recorded(self) -> list[dict[str, str]]:
        """Lines of the table of milestones."""
        return milestones.read(self.path / TABLE_NAME)[0]

    def set_aside(self, path: Path) -> str:
        """Keep what is no good checkpoint for inspection, out of the way of later ones; returns its new name."""
        aside = path.with_name(f"{path.name}.{_BROKEN}")
        if _MILESTONE.fullmatch(path.name):
            aside = _free(aside)
        elif aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)
        path.rename(aside)
        return aside.name

    def is_aside(self, name: str) -> bool:
        """Whether a checkpoint was set aside and nothing has taken its place."""
        return os.path.lexists(self.path / f"{name}.{_BROKEN}") and not os.path.lexists(self.path / name)

    def point_latest(self) -> None:
        """Make `latest` name the newest restart checkpoint; without one there is no `latest`."""
        points = self.restart_checkpoints()
        if points:
            write_whole(self.path / LATEST_NAME, f"{points[0].name}\n".encode())
        else:
            (self.path / LATEST_NAME).unlink(missing_ok=True)

    def retain(self) -> list[str]:
        """After a restart checkpoint is durable: point `latest` to it, delete those beyond the last K; their names.

        The new one was read back and compared after its flush, so the newest verified one is always among those kept.
        """
        self.point_latest()
        surplus = self.restart_checkpoints()[self._keep :]
        for old in surplus:
            remove(old)
        return [old.name for old in surplus]

    def keep_earlier(self, folder: Path, marker: Marker) -> None:
        """Move a milestone of other content out of the way of the one that `marker` describes; it is not deleted.

        Nor is a link to where it was moved, although that may be out of reach now.
        """
        if not folder.is_symlink() or folder.exists():
            try:
                if not _is_finished(folder) or read_marker(folder).digest == marker.digest:
                    return
            except CheckpointError:
                pass  # damaged, but perhaps not beyond use
        folder.rename(_free(folder.with_name(f"{folder.name}.{_EARLIER}")))

    def record(self, milestone: Milestone) -> None:
        """Write a milestone's line, in place of an earlier one of its name (a rewound run passes it again).

        A table that someone damaged is set aside, its whole lines are kept: no training ends for it.
        """
        self._mend_table()
        write_whole(self.path / TABLE_NAME, milestones.with_line(self.recorded(), milestone))

    def _mend_table(self) -> list[str]:
        """Leave a table of whole lines alone, or none; what was done, as `sweep` says it."""
        table = self.path / TABLE_NAME
        rows, whole = milestones.read(table)
        if whole:
            return []
        aside = self.set_aside(table)
        if rows:
            write_whole(table, milestones.as_table(rows))
        return [f"{TABLE_NAME}: damaged, {len(rows)} of its lines are whole and stay; set aside as {aside}"]

    def _folders(self) -> list[Path]:
        return [p for p in self.path.iterdir() if p.is_dir()] if self.path.is_dir() else []


def _free(path: Path) -> Path:
    """The path, or `PATH_2`, `PATH_3` where that is taken."""
    paths = (path if n == 1 else path.with_name(f"{path.name}_{n}") for n in itertools.count(1))
    return next(path for path in paths if not os.path.lexists(path))


def _is_finished(folder: Path) -> bool:
    """Whether a folder has a marker; one that cannot be read counts: opening it raises, nothing removes it."""
    try:
        (folder / MARKER_NAME).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
