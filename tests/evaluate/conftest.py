from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}

import pytest
from lm_eval.tasks import TaskManager

from megatron_patch.evaluate.run import task_manager
from tests.convert.samples import train_tokenizer
from tests.evaluate.small_data import write_all


@pytest.fixture(autouse=True)
def keep_environment() -> Iterator[None]:
    """Loading a model writes RANK and its like into the environment, as a launcher would."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every data set of the suite, small."""
    folder = tmp_path_factory.mktemp("data")
    write_all(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def manager() -> TaskManager:
    return task_manager()
