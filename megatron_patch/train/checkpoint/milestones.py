"""The milestones that a run already has, looked at when it starts: each keeps its name, and has its line in the table.

Only rank 0 looks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from megatron_patch.data.order import SampleOrder
from megatron_patch.run.milestones import Milestone
from megatron_patch.train.cadence import Cadence
from megatron_patch.train.checkpoint.format import (
    MARKER_NAME,
    CheckpointError,
    Contents,
    State,
    read_index,
    read_marker,
    said_digest,
)
from megatron_patch.train.checkpoint.run_folder import RunFolder


def milestone_of(
    folder: Path, state: State, contents: Contents, digest: str, cadence: Cadence, order: SampleOrder, written: float
) -> Milestone:
    """The line of a milestone that became durable at `written`, in seconds since 1970."""
    per_segment = order.steps_per_segment
    return Milestone(
        name=folder.name,
        step=state.step,
        samples=state.samples,
        tokens=state.tokens,
        segments=f"{cadence.since(state.step) // per_segment}-{(state.step - 1) // per_segment}",
        wall_time=datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds"),
        contents=contents,
        digest=digest,
    )


def missing_lines(runs: RunFolder, order: SampleOrder) -> Iterator[Milestone]:
    """Lines of finished milestones that the table lacks, or has of an earlier folder of that name, or has wrong.

    What stops a run between a milestone and its line (a full disk, a kill) leaves the one without the other. A line
    whose samples are not its steps' is an edited one, or of a run that changed its batch: the milestone itself says. A
    damaged milestone gets none: opening it raises the error.
    """
    recorded = {row["name"]: row for row in runs.recorded()}
    for folder in runs.milestones():
        row = recorded.get(folder.name)
        in_step = row and int(row["samples"]) == int(row["step"]) * order.global_batch_size
        if row and in_step and said_digest(folder) == row["digest"]:
            continue
        try:
            digest = read_marker(folder).digest
            index = read_index(folder)
            written = (folder / MARKER_NAME).stat().st_mtime
        except (CheckpointError, OSError):
            continue
        # Its own recipe says what its interval was.
        cadence = Cadence(index.recipe.checkpoint, order.steps_per_segment)
        line = milestone_of(folder, index.state, index.contents, digest, cadence, order, written)
        said = row and (row["digest"], int(row["step"]), int(row["samples"]))
        if said != (digest, line.step, line.samples):
            yield line


def numbers_taken(runs: RunFolder, cadence: Cadence) -> str:
    """Which milestone of the table has a number that the run would now give to another step; empty where none.

    Numbers follow from checkpoint.milestone_steps, or from the batch and the rows of a segment. A milestone that was
    moved elsewhere counts as well: it still is what it is called.
    """
    if not cadence.milestone_steps:
        return ""
    for row in runs.recorded():
        numbered = re.fullmatch(r"ckpt_(\d+)", row["name"])
        if numbered and int(row["step"]) != (now := (int(numbered[1]) + 1) * cadence.milestone_steps):
            return (
                f"{row['name']} is the milestone of step {row['step']}; every {cadence.milestone_steps} steps "
                f"(checkpoint.milestone_steps) it would be step {now}'s"
            )
    return ""
