"""When a checkpoint is due: restart checkpoints often and few kept, milestones seldom and for ever.

Milestones fall on every multiple of their interval, and on the last step of a run, whatever its number.
"""

from __future__ import annotations

from megatron_patch.recipe import Checkpoint
from megatron_patch.train.checkpoint.format import Contents


class Cadence:
    """The recipe's checkpoint section over a data set whose segments give `steps_per_segment` steps each."""

    def __init__(self, policy: Checkpoint, steps_per_segment: int) -> None:
        self._policy = policy
        self.milestone_steps = steps_per_segment if policy.milestone_steps is None else policy.milestone_steps

    def restart_checkpoint_due(self, step: int) -> bool:
        """By steps; the clock asks through `signals.Requests`."""
        return bool(self._policy.interval_steps) and step % self._policy.interval_steps == 0

    def milestone(self, step: int) -> tuple[int, Contents] | None:
        """The number of the milestone due after `step` and what it holds; milestone 0 is the first segment's."""
        if not self.milestone_steps or step % self.milestone_steps:
            return None
        number = step // self.milestone_steps - 1
        every = self._policy.full_milestone_every
        return number, "full" if every and (number + 1) % every == 0 else "weights"

    def since(self, step: int) -> int:
        """Steps done at the milestone before the one after `step`; 0 before the first."""
        return (step - 1) // self.milestone_steps * self.milestone_steps if self.milestone_steps else 0
