"""The data set and the undisturbed run that disturbed ones are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.job import Job, write_data_set

STEPS = 60
LAYOUT = ["parallel.tensor=2", "parallel.pipeline=2", "batch.micro_batch_size=4"]
RANKS = 4


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data") / "set")


def run_settings(data_folder: Path, run: Path, *overrides: str) -> list[str]:
    """The demo recipe's layout at toy size, 60 steps, two milestones, no clock."""
    settings = ["checkpoint.interval_minutes=0", "checkpoint.interval_steps=3", "data.held_out_interval=20"]
    return [*LAYOUT, f"data.folder={data_folder}", f"run.folder={run}", f"run.steps={STEPS}", *settings, *overrides]


@pytest.fixture(scope="session")
def undisturbed(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of 60 steps without an interruption."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    Job(RANKS, run_settings(data_folder, run), run.with_suffix(".log")).run()
    return run
