from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.convert.conftest import hf_modules_cache, tokenizer, weights  # noqa: F401
from tests.devices.models import device_tokenizer  # noqa: F401


@pytest.fixture(autouse=True)
def keep_environment() -> Iterator[None]:
    """Loading a checkpoint writes RANK and its like into the environment, as a launcher would."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
