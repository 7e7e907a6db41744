"""A run that starts from the weights of another: `run.initial_weights`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_patch.run.attempts import read_status
from megatron_patch.train.checkpoint import open_checkpoint, write_weights
from tests.train.job import Job, write_data_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a run of 3 steps on it and, as an import makes one, a checkpoint of its weights alone."""
    folder = tmp_path_factory.mktemp("initial")
    write_data_set(folder / "data")
    Job(1, [*settings(folder, "first"), "run.steps=3"], folder / "first.log").run()
    with open_checkpoint(folder / "first/checkpoints/step_00000003") as checkpoint:
        write_weights(checkpoint, folder / "imported")
    return folder


def settings(folder: Path, run: str) -> list[str]:
    return [
        f"data.folder={folder / 'data'}", f"run.folder={folder / run}", "batch.micro_batch_size=4",
        "checkpoint.interval_minutes=0", "data.held_out_interval=0", "optimizer.decay_steps=20",
        "optimizer.warmup_steps=2",
    ]  # fmt: skip


@pytest.mark.parametrize("start", ["imported", "first/checkpoints/step_00000003"])
def test_step_0_has_the_weights_of_another_checkpoint(folder: Path, start: str) -> None:
    """The learning rate of the first step is 0: it leaves the weights as they were."""
    run = start.split("/")[0] + "_on"
    overrides = [*settings(folder, run), f"run.initial_weights={folder / start}"]
    log = folder / f"{run}.log"
    Job(2, [*overrides, "parallel.tensor=2", "run.steps=1"], log).run()
    assert f"step 0 has the weights of {folder / start} (step 3 of demo)" in log.read_text()
    with (
        open_checkpoint(folder / "first/checkpoints/step_00000003") as first,
        open_checkpoint(folder / run / "checkpoints/step_00000001") as after,
    ):
        assert all(torch.equal(first.tensor(name), after.tensor(name)) for name in first.names())
        assert (after.step, after.state.optimizer_step) == (1, 1)

    Job(1, [*overrides, "run.steps=2"], log).run()  # goes on from its own checkpoint
    assert "resuming from" in log.read_text()
    with open_checkpoint(folder / run / "checkpoints/step_00000002") as later:
        assert not torch.equal(later.tensor("output_layer.weight"), first_head(folder))


def first_head(folder: Path) -> torch.Tensor:
    with open_checkpoint(folder / "first/checkpoints/step_00000003") as checkpoint:
        return checkpoint.tensor("output_layer.weight")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.initial_weights={}/absent", "absent"),
        ("model.norm_epsilon=1.0e-6", "is another model: model.norm_epsilon: 1e-05 -> 1e-06"),
    ],
)
def test_what_is_no_checkpoint_of_this_model_is_refused(folder: Path, override: str, words: str) -> None:
    overrides = [f"run.initial_weights={folder / 'imported'}", "run.steps=3", override.format(folder)]
    job = Job(1, [*settings(folder, "refused"), *overrides], folder / "refused.log")
    assert job.wait() == [2]
    assert words in (folder / "refused.log").read_text()
    assert read_status(folder / "refused")["reason"].startswith("refused: ")
