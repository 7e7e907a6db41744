from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster


@pytest.fixture(scope="session")
def scratch() -> Path:
    """A tmpfs that `tests/cluster/run` mounted inside the tests' own namespaces."""
    folder = os.environ.get("CLUSTER_SCRATCH")
    if folder is None:
        pytest.fail("the cluster tests run inside namespaces of their own: start them with tests/cluster/run")
    return Path(folder)


@pytest.fixture(scope="module")
def cluster(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Twenty idle nodes of eight pretended GPUs."""
    with Cluster(scratch / request.module.__name__) as running:
        yield running
