from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from site_folder import REPOSITORY, SHAPE, write_raw_rows
from slurm_cluster import Cluster


@pytest.fixture(scope="session")
def scratch() -> Path:
    """A tmpfs that `tests/cluster/run` mounted inside the tests' own namespaces."""
    folder = os.environ.get("CLUSTER_SCRATCH")
    if folder is None:
        pytest.fail("the cluster tests run inside namespaces of their own: start them with tests/cluster/run")
    return Path(folder)


@pytest.fixture(scope="session")
def data(scratch: Path) -> Path:
    """A data set that the tiny recipe trains on."""
    write_raw_rows(scratch / "raw")
    build = [sys.executable, "data_tools/build_amber.py", "index", *SHAPE]
    subprocess.run([*build, "--input", scratch / "raw", "--output", scratch / "data"], cwd=REPOSITORY, check=True)
    return scratch / "data"


@pytest.fixture(scope="module")
def cluster(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Twenty idle nodes of eight pretended GPUs."""
    with Cluster(scratch / request.module.__name__) as running:
        yield running
