"""What the loop knows of checkpoints: resume at the start, `after_step` after each step, `finish` at the end."""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta
from pathlib import Path

from megatron_patch.data.order import SampleOrder
from megatron_patch.optim.zero import ShardedOptimizer
from megatron_patch.parallel.topology import Topology
from megatron_patch.recipe import Recipe
from megatron_patch.run.held import Held
from megatron_patch.run.milestones import TABLE_NAME
from megatron_patch.run.status_file import StatusFile
from megatron_patch.train.cadence import Cadence
from megatron_patch.train.checkpoint.format import MARKER_NAME, CheckpointError, Contents, State
from megatron_patch.train.checkpoint.milestones import milestone_of, missing_lines, numbers_taken
from megatron_patch.train.checkpoint.resume import resume
from megatron_patch.train.checkpoint.run_folder import RunFolder
from megatron_patch.train.checkpoint.save import Saved, Saver
from megatron_patch.train.note import note
from megatron_patch.train.side_channel import SideChannel

_SLOWEST_VERIFY = timedelta(hours=1)
ONE_TRAINING = "let one training have the folder, and give another run.folder to any other"


class Keeper:
    """A run's checkpoints by its recipe's cadence and retention. Every rank makes one and calls it alike."""

    def __init__(
        self,
        recipe: Recipe,
        topology: Topology,
        optimizer: ShardedOptimizer,
        order: SampleOrder,
        total_steps: int,
        status: StatusFile,
    ) -> None:
        self._recipe, self._topology, self._optimizer = recipe, topology, optimizer
        self._order, self._total_steps, self._status = order, total_steps, status
        self._cadence = Cadence(recipe.checkpoint, order.steps_per_segment)
        self._folder = RunFolder(recipe)
        self._saver = Saver(recipe, topology, optimizer, self._placed)
        self._channel = SideChannel(_SLOWEST_VERIFY)
        self._held: Held | None = None  # the folder of checkpoints (rank 0)
        self._are_numbered = True  # whether milestones have numbers; where those are taken, each is named by its step
        self._owes_end = False  # whether the step resumed from is the last one and has no milestone yet
        self._newest: int | None = None  # step of the newest restart checkpoint begun or resumed from

    def resume(self, data_digest: str, accept_changes: bool) -> State:
        """Restore the newest good checkpoint; the state of step 0 where there is none. See `checkpoint.resume`.

        Completes the table of milestones.
        """
        found = resume(
            self._recipe,
            data_digest,
            self._order.total_steps,
            accept_changes,
            self._optimizer,
            self._topology,
            self._channel,
            note if self._topology.rank == 0 else lambda _: None,
        )
        self._hold()
        steps, self._are_numbered = self._channel.from_first(self._milestones() if self._topology.rank == 0 else None)
        if found is None:
            return State(step=0, samples=0, tokens=0, optimizer_step=0, data_digest=data_digest)
        if self._topology.rank == 0:
            for folder in self._folder.restart_checkpoints()[:1]:
                step = int(folder.name.removeprefix("step_"))
                self._status.checkpoint(folder.name, step, (folder / MARKER_NAME).stat().st_mtime)
        # It may have stood there when more steps were planned.
        self._owes_end = found.step >= self._total_steps and found.step not in steps
        # A milestone it went on from is no restart checkpoint: `finish` must leave one.
        self._newest = found.step if self._folder.restart_checkpoint(found.step).exists() else None
        return found.model_copy(update={"data_digest": data_digest})

    def _milestones(self) -> tuple[list[int], bool]:
        """Steps of those there are, and whether the next ones may go on with their numbers. Writes missing lines."""
        for line in missing_lines(self._folder, self._order):
            self._folder.record(line)
            note(f"{self._folder.path}/{TABLE_NAME}: the line of {line.name} was missing or wrong; written")
        if taken := numbers_taken(self._folder, self._cadence):
            note(f"{taken}: it stays, and those to come are named by their steps")
        kept = (row for row in self._folder.recorded() if not self._folder.is_aside(row["name"]))
        return [int(row["step"]) for row in kept], not taken

    def after_step(self, state: State, due: bool) -> bool:
        """Begin the saves that fall on this step; `due`: by the clock a restart checkpoint is. True if one was begun.

        Raises CheckpointError where a save before failed.
        """
        self._saver.check()
        self._milestone(state)
        if due or self._cadence.restart_checkpoint_due(state.step):
            self._restart_checkpoint(state)
            return True
        return False

    def missing(self) -> str:
        """That the folder of checkpoints is no longer at its path (rank 0); empty where it is, or never was."""
        return "" if self._held is None else self._held.missing()

    def finish(self, state: State, gone: str = "") -> str:
        """Leave a durable restart checkpoint of this state, wherever the run's folder is by now.

        Returns, on every rank alike, what of the run is gone from its path: `gone`, where the first rank has seen it
        before, or what it finds now. Raises CheckpointError where the restart checkpoint cannot be written.
        """
        if self._owes_end:
            self._milestone(state)
            self._owes_end = False
        self._saver.wait()
        if not self._channel.from_first(self._topology.rank == 0 and self._is_saved(state)):
            self._restart_checkpoint(state)
        self._saver.wait()
        if self._topology.rank == 0:
            gone = gone or self._status.look() or self.missing()
        return str(self._channel.from_first(gone))

    def _is_saved(self, state: State) -> bool:
        """Whether this state's restart checkpoint, begun or resumed from, is there (rank 0)."""
        with contextlib.suppress(CheckpointError, OSError):  # the save that follows tells all ranks
            folder = self._placed(self._folder.restart_checkpoint(state.step))
            return self._newest == state.step and folder in self._folder.restart_checkpoints()
        return False

    def _placed(self, folder: Path) -> Path:
        """Where a checkpoint of this run is written now (rank 0).

        Raises CheckpointError where it must be written nowhere, OSError where it cannot be.
        """
        if gone := self._status.look():
            if self._status.lock.taken:
                raise CheckpointError(folder, f"{gone}; {self._status.lock.taken}", ONE_TRAINING)
            self._folder.path = self._status.lock.place / self._folder.path.name
        self._folder.path.mkdir(exist_ok=True)
        self._hold()
        return self._folder.path / folder.name

    def _hold(self) -> None:
        if self._topology.rank == 0 and self._held is None and self._folder.path.is_dir():
            self._held = Held(self._folder.path)

    def _milestone(self, state: State) -> None:
        """Begin to save the milestone that falls on this step, where one does."""
        folder = self._folder.milestone_at(state.step)
        contents: Contents = "weights"
        if (numbered := self._cadence.milestone(state.step)) is not None:
            number, contents = numbered
            folder = self._folder.milestone(number) if self._are_numbered else folder
        elif state.step < self._total_steps or not self._cadence.milestone_steps:
            return
        self._saver.save(folder, self._complete(state), contents, self._milestone_durable, self._folder.keep_earlier)

    def _restart_checkpoint(self, state: State) -> None:
        folder = self._folder.restart_checkpoint(state.step)
        self._saver.save(folder, self._complete(state), "full", self._restart_checkpoint_durable)
        self._newest = state.step

    def _complete(self, state: State) -> State:
        return state.model_copy(update={"optimizer_step": self._saver.optimizer_step})

    def _restart_checkpoint_durable(self, saved: Saved) -> None:
        deleted = self._folder.retain()
        self._status.checkpoint(saved.folder.name, saved.state.step, time.time())
        _report(saved, f"; deleted {', '.join(deleted)}" if deleted else "")

    def _milestone_durable(self, saved: Saved) -> None:
        cadence, order = self._cadence, self._order
        line = milestone_of(saved.folder, saved.state, saved.contents, saved.digest, cadence, order, time.time())
        self._folder.record(line)
        _report(saved, "")


def _report(saved: Saved, more: str) -> None:
    note(
        f"checkpoint {saved.folder} is durable: step {saved.state.step}, {saved.bytes / 1e6:,.1f} MB, "
        f"the loop stood still {1000 * saved.stall:.0f} ms, written in {saved.seconds:.1f} s{more}"
    )
