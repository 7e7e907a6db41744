"""What the loop knows of checkpoints: resume at the start, `after_step` after each step, `finish` at the end."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from megatron_patch.data.order import SampleOrder
from megatron_patch.optim.zero import ShardedOptimizer
from megatron_patch.parallel.topology import Topology
from megatron_patch.recipe import Recipe
from megatron_patch.run.milestones import Milestone
from megatron_patch.run.status_file import StatusFile
from megatron_patch.train.cadence import Cadence
from megatron_patch.train.checkpoint.format import MARKER_NAME, State
from megatron_patch.train.checkpoint.resume import resume
from megatron_patch.train.checkpoint.run_folder import RunFolder
from megatron_patch.train.checkpoint.save import Saved, Saver
from megatron_patch.train.note import note
from megatron_patch.train.side_channel import SideChannel

_SLOWEST_VERIFY = timedelta(hours=1)


class Keeper:
    """A run's checkpoints by its recipe's cadence and retention. Every rank makes one and calls it alike."""

    def __init__(
        self, recipe: Recipe, topology: Topology, optimizer: ShardedOptimizer, order: SampleOrder, status: StatusFile
    ) -> None:
        self._recipe, self._topology, self._optimizer = recipe, topology, optimizer
        self._order, self._status = order, status
        self._cadence = Cadence(recipe.checkpoint, order.steps_per_segment)
        self._folder = RunFolder(recipe)
        self._saver = Saver(recipe, topology, optimizer)
        self._newest: int | None = None  # step of the newest restart point begun or resumed from

    def resume(self, data_digest: str, accept_changes: bool) -> State:
        """Restore the newest good checkpoint; the state of step 0 where there is none. See `checkpoint.resume`."""
        found = resume(
            self._recipe,
            data_digest,
            self._order.total_steps,
            accept_changes,
            self._optimizer,
            self._topology,
            SideChannel(_SLOWEST_VERIFY),
            note if self._topology.rank == 0 else lambda _: None,
        )
        if found is None:
            return State(step=0, samples=0, tokens=0, optimizer_step=0, data_digest=data_digest)
        if self._topology.rank == 0:
            for folder in self._folder.restart_points()[:1]:
                step = int(folder.name.removeprefix("step_"))
                self._status.checkpoint(folder.name, step, (folder / MARKER_NAME).stat().st_mtime)
        # A milestone it went on from is no restart point: `finish` must leave one.
        self._newest = found.step if self._folder.restart_point(found.step).exists() else None
        return found.model_copy(update={"data_digest": data_digest})

    def after_step(self, state: State, due: bool) -> bool:
        """Begin the saves that fall on this step; `due`: the clock asks for a restart point. True where one was begun.

        Raises CheckpointError where a save before failed.
        """
        self._saver.check()
        milestone = self._cadence.milestone(state.step)
        if milestone is not None:
            number, contents = milestone
            self._saver.save(self._folder.milestone(number), self._complete(state), contents, self._milestone_durable)
        if due or self._cadence.restart_point_due(state.step):
            self._restart_point(state)
            return True
        return False

    def finish(self, state: State) -> None:
        """Leave a durable restart point of this state. Raises CheckpointError where it cannot be written."""
        if self._newest != state.step:
            self._restart_point(state)
        self._saver.wait()

    def _restart_point(self, state: State) -> None:
        folder = self._folder.restart_point(state.step)
        self._saver.save(folder, self._complete(state), "full", self._restart_point_durable)
        self._newest = state.step

    def _complete(self, state: State) -> State:
        return state.model_copy(update={"optimizer_step": self._saver.optimizer_step})

    def _restart_point_durable(self, saved: Saved) -> None:
        deleted = self._folder.retain()
        self._status.checkpoint(saved.folder.name, saved.state.step, time.time())
        _report(saved, f"; deleted {', '.join(deleted)}" if deleted else "")

    def _milestone_durable(self, saved: Saved) -> None:
        step = saved.state.step
        first = (step - self._cadence.milestone_steps) // self._order.steps_per_segment
        self._folder.record(
            Milestone(
                name=saved.folder.name,
                step=step,
                samples=saved.state.samples,
                tokens=saved.state.tokens,
                segments=f"{first}-{(step - 1) // self._order.steps_per_segment}",
                wall_time=datetime.now(UTC).isoformat(timespec="seconds"),
                contents=saved.contents,
                digest=saved.digest,
            )
        )
        _report(saved, "")


def _report(saved: Saved, more: str) -> None:
    note(
        f"checkpoint {saved.folder} is durable: step {saved.state.step}, {saved.bytes / 1e6:,.1f} MB, "
        f"the loop stood still {1000 * saved.stall:.0f} ms, written in {saved.seconds:.1f} s{more}"
    )
