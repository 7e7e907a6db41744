from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.convert.samples import MemoryWeights, small_recipe, train_tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def hf_modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remote code of one test is not seen by another."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf_modules"))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """`import` runs our model, for which it takes a place among ranks: no other test is to find that place."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def weights() -> MemoryWeights:
    return MemoryWeights(small_recipe())
