"""Go on from the newest good checkpoint of a run, in whatever layout the run now has."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from megatron_patch.model.parameters import whole_tensors
from megatron_patch.optim.zero import ShardedOptimizer
from megatron_patch.parallel.topology import Topology
from megatron_patch.recipe import Recipe
from megatron_patch.train.checkpoint.format import CheckpointError, State, StoredFile, check_file, read_marker
from megatron_patch.train.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_patch.train.checkpoint.restore import restore, set_encoder
from megatron_patch.train.checkpoint.run_folder import RunFolder
from megatron_patch.train.side_channel import SideChannel
from megatron_patch.vision.clip_folder import ClipFolder

# Settings that change neither the rows nor what is computed from them, beyond the order of sums.
_FREE = re.compile(
    r"parallel\..+|batch\.micro_batch_size|recompute|kernels|data\.(folder|held_out_.+|read_ahead|stage_folder)|"
    r"checkpoint\..+|watchdog\..+|run\..+"
)

_MEANING = re.compile(r"model\.(?!sequence_length|init_std)")


class ResumeRefused(CheckpointError):
    """The run now has other data or another recipe than its checkpoint."""


def resume(
    recipe: Recipe,
    data_digest: str,
    data_steps: int,
    accept_changes: bool,
    optimizer: ShardedOptimizer,
    topology: Topology,
    channel: SideChannel,
    note: Callable[[str], None],
) -> State | None:
    """Restore the newest good checkpoint of the run and return where it stands; None where the run has none yet.

    Where it has none, weights are those of `run.initial_weights`, if it is set, from here on. Every rank must call it.
    `data_steps` are those of the whole data set, once. `note` receives lines for people: what
    was unfinished, broken, fallen back to, changed.
    Raises ResumeRefused where data or recipe changed and `accept_changes` is not set, CheckpointError where there
    are checkpoints and none of them is good.
    """
    runs = RunFolder(recipe)
    if runs.path.exists() and not runs.path.is_dir():
        raise ResumeRefused(runs.path, "is not a folder", "move it away: checkpoints go there")
    listed: tuple[list[str], list[str]] | None = None
    if topology.rank == 0:
        for line in runs.sweep():
            note(f"{runs.path}/{line}")
        listed = [str(folder) for folder in runs.candidates()], [str(folder) for folder in runs.milestones()[-1:]]
    found, milestones = channel.from_first(listed)
    candidates = [Path(folder) for folder in found]
    if not candidates:
        for name in milestones:
            _begin_again_beside(Path(name), recipe, data_digest, data_steps, channel, note)
        if recipe.run.initial_weights is not None:
            _start_from(recipe.run.initial_weights, recipe, optimizer, topology, channel, note)
        if recipe.run.initial_encoder is not None and recipe.model.vision is not None:
            encoder = ClipFolder(recipe.run.initial_encoder, recipe.model.vision)
            set_encoder(encoder, optimizer, topology)
            note(f"the encoder of step 0 has the weights of {recipe.run.initial_encoder}")
        return None
    broken: list[Path] = []
    for folder in candidates:
        checkpoint, problem = _verified(folder, topology, channel)
        if checkpoint is not None and not (problem := _renamed(checkpoint, runs)):
            break
        note(f"{problem.splitlines()[0]}; falling back to the checkpoint before")
        broken.append(folder)
    else:
        raise CheckpointError(
            runs.path,
            f"none of the {len(candidates)} checkpoints is good (see above)",
            "see to the file system; to begin again at step 0, move the folder away",
        )
    with checkpoint:
        if (obstacle := _obstacle(checkpoint.recipe, recipe)) is not None:
            raise ResumeRefused(folder, obstacle, "restore the setting, or use another run.folder")
        changes = _changes(checkpoint, recipe, data_digest, data_steps, note)
        if changes and not accept_changes:
            raise ResumeRefused(
                folder,
                "the run was trained otherwise:\n" + "\n".join(f"    {line}" for line in changes),
                "restore the settings, use another run.folder, or go on with --accept-changes (it is recorded)",
            )
        restore(checkpoint, optimizer, topology)
        state = checkpoint.state
    if topology.rank == 0:
        for bad in broken:
            runs.set_aside(bad)
        runs.point_latest()
    note(f"resuming from {folder} at step {state.step}, {state.samples:,} samples")
    return state.model_copy(update={"accepted_changes": [*state.accepted_changes, *changes]})


def _begin_again_beside(
    milestone: Path,
    recipe: Recipe,
    data_digest: str,
    data_steps: int,
    channel: SideChannel,
    note: Callable[[str], None],
) -> None:
    """No checkpoint to go on from is left: step 0 begins a run that has milestones, if it is the run that they are of.

    Raises ResumeRefused where it is another, whose milestones would have their names.
    """
    problem = _problem(lambda: open_checkpoint(milestone, verify=False).close(), channel)
    if problem:
        note(problem.splitlines()[0])
    else:
        with open_checkpoint(milestone, verify=False) as checkpoint:
            obstacle = _obstacle(checkpoint.recipe, recipe)
            changes = [obstacle] if obstacle else _changes(checkpoint, recipe, data_digest, data_steps, note)
        if changes:
            raise ResumeRefused(
                milestone,
                "is a milestone of a run that was trained otherwise, of which no checkpoint to go on from is left:\n"
                + "\n".join(f"    {line}" for line in changes),
                f"use another run.folder (run.initial_weights={milestone} begins with its weights)",
            )
    note(f"no checkpoint to go on from is left beside the milestones in {milestone.parent}: begins again at step 0")


def _start_from(
    folder: Path,
    recipe: Recipe,
    optimizer: ShardedOptimizer,
    topology: Topology,
    channel: SideChannel,
    note: Callable[[str], None],
) -> None:
    """Weights of a checkpoint in place of those drawn from the seed; rows and schedule begin at step 0."""
    remedy = "name a checkpoint of this model as run.initial_weights, or leave it out"
    checkpoint, problem = _verified(folder, topology, channel)
    if checkpoint is None:
        raise ResumeRefused(folder, problem.splitlines()[0], remedy)
    with checkpoint:
        # Rows may be longer than those it was trained on; all else of the model says what its weights mean.
        unlike = [line for line in checkpoint.recipe.differences(recipe) if _MEANING.match(line)]
        if checkpoint.recipe.model.vision is None:  # the decoder of a model that is to see from here on
            unlike = [line for line in unlike if not line.startswith("model.vision")]
        if unlike:
            raise ResumeRefused(folder, f"is another model: {'; '.join(unlike)}", remedy)
        if checkpoint.recipe.model.vision is not None and recipe.run.initial_encoder is not None:
            raise ResumeRefused(folder, "has an encoder already", "leave run.initial_encoder out")
        restore(checkpoint, optimizer, topology, weights_alone=True)
        note(f"step 0 has the weights of {folder} (step {checkpoint.step} of {checkpoint.recipe.name})")


def _verified(folder: Path, topology: Topology, channel: SideChannel) -> tuple[Checkpoint | None, str]:
    """A good checkpoint, or what is wrong with it; the ranks share its files among them, and agree.

    Raises CheckpointError where its index is of another version.
    """
    mine: dict[str, StoredFile] = {}

    def check_files() -> None:
        files = sorted(read_marker(folder).files.items())
        mine.update(files[topology.rank :: topology.world_size])
        for name, expected in mine.items():
            check_file(folder, name, expected)

    if problem := _problem(check_files, channel):
        return None, problem
    checkpoint = open_checkpoint(folder, verify=False)
    if problem := _problem(lambda: checkpoint.check_fragments(mine), channel):
        checkpoint.close()
        return None, problem
    return checkpoint, ""


def _problem(check: Callable[[], None], channel: SideChannel) -> str:
    """What the first rank whose check fails says of it, on every rank; empty where none fails."""
    try:
        check()
        problem = ""
    except CheckpointError as error:
        problem = str(error)
    return next((answer for answer in channel.gather(problem) if answer), "")


def _renamed(checkpoint: Checkpoint, runs: RunFolder) -> str:
    """A copy under a later step's name would stay the newest for ever, and every resume would go back to it."""
    folder = checkpoint.folder
    if folder.name.startswith("step_") and folder != runs.restart_checkpoint(checkpoint.step):
        return f"{folder}: holds step {checkpoint.step}, so it was renamed"
    return ""


def _obstacle(trained: Recipe, recipe: Recipe) -> str | None:
    """A change that no flag makes possible."""
    was, now = trained.batch.global_batch_size, recipe.batch.global_batch_size
    if was != now:
        return f"batch.global_batch_size was {was}, now it is {now}: a step would no longer name its rows"
    if whole_tensors(trained.model) != whole_tensors(recipe.model):
        return "the model's tensors had other shapes: " + "; ".join(
            line for line in trained.differences(recipe) if line.startswith("model.")
        )
    return None


def _changes(
    checkpoint: Checkpoint, recipe: Recipe, data_digest: str, data_steps: int, note: Callable[[str], None]
) -> list[str]:
    """Differences that training would not survive unnoticed; the harmless ones are noted."""
    changes = []
    for line in checkpoint.recipe.differences(recipe):
        setting = line.split(": ")[0]
        if setting == "optimizer.decay_steps":
            continue  # what matters is where the schedule ends
        if _FREE.match(setting):
            note(f"changed since the checkpoint: {line}")
        else:
            changes.append(line)
    was, now = (_schedule_end(r, data_steps) for r in (checkpoint.recipe, recipe))
    if was != now:
        schedule = checkpoint.recipe.optimizer.schedule
        changes.append(
            f"last step of the learning rate's {schedule}: {was} -> {now} (optimizer.decay_steps={was} keeps it there)"
        )
    if checkpoint.data_digest != data_digest:
        changes.append(f"data set: {checkpoint.data_digest} -> {data_digest}")
    return changes


def _schedule_end(recipe: Recipe, data_steps: int) -> int:
    return recipe.optimizer.decay_steps or recipe.run.steps or data_steps
