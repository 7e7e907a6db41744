"""Import what ranks need once, in the parent they are forked from; one thread a process, as OpenMP survives no fork."""

import os
import warnings
from pathlib import Path

import pytest
import torch

if os.environ.get("TESTS_ON_GPU") != "1":  # the suite is a CPU's: several ranks would take one GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first asks for GPUs
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, which DeepSpeed does
torch.set_num_threads(1)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron_patch.train.step  # noqa: F401

from tests.train.job import RANKS, Job, run_settings, write_data_set  # noqa: E402


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="session")
def undisturbed(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of 60 steps without an interruption."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    Job(RANKS, run_settings(data_folder, run), run.with_suffix(".log")).run()
    return run
