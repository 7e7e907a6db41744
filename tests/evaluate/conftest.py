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
from tests.evaluate import small_data
from tests.evaluate.hub import Downloaded, Hub


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
    small_data.write_all(folder)
    return folder


@pytest.fixture(scope="session")
def repositories() -> dict[str, dict[str, bytes]]:
    """The same data sets as the hub has them."""
    return small_data.repositories()


@pytest.fixture(scope="session")
def downloaded(
    repositories: dict[str, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Downloaded]:
    """Every data set of the suite, fetched from a hub that goes on serving."""
    place = tmp_path_factory.mktemp("downloaded")
    with Hub(repositories) as hub:
        code, errors = hub.evaluate(place / "home", "--download", place / "data")
        assert code == 0, errors
        yield Downloaded(place / "data", place / "home", hub, errors, tuple(hub.fetched))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def manager() -> TaskManager:
    return task_manager()
