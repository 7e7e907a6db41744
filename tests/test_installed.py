"""The package installed, without its repository or beside a clone in which nothing was built (slurm/Dockerfile)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILT = shutil.ignore_patterns("*.so", "__pycache__")


def run(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a wheel holds that was built from an sdist, in a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("megatron_patch", "data_tools", "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=BUILT)
    (folder / "tests").mkdir()
    shutil.copy(__file__, folder / "tests")
    made = run(folder, "setup.py", "-q", "sdist", "--dist-dir", "dist")
    assert made.returncode == 0, made.stderr
    with tarfile.open(next((folder / "dist").glob("*.tar.gz"))) as sdist:
        sdist.extractall(folder / "sdist", filter="data")
    source = next((folder / "sdist").iterdir())
    assert not (source / "tests").exists(), "a part of the tests, which needs the rest of the repository"
    options = ("--no-build-isolation", "--check-build-dependencies", "--no-deps", "--no-index", "--quiet")
    made = run(folder, "-m", "pip", "wheel", *options, "-w", "dist", str(source), AMBER_CXXFLAGS="-O0")
    assert made.returncode == 0, made.stderr
    with zipfile.ZipFile(next((folder / "dist").glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_a_recipe_is_named_where_there_is_no_repository(installed: Path, tmp_path: Path) -> None:
    recipes = installed / "megatron_patch" / "recipes"
    assert {file.relative_to(recipes): file.read_bytes() for file in recipes.rglob("*.yaml")} == {
        file.relative_to(ROOT / "recipes"): file.read_bytes() for file in (ROOT / "recipes").rglob("*.yaml")
    }
    (tmp_path / "own.yaml").write_text("extends: mobillama_08b\nname: own\n")
    script = (
        "import sys; from megatron_patch.__main__ import main; codes = [main(['plan', *argument.split()])"
        " for argument in sys.argv[1:]]; print(codes)"
    )
    named = (
        "",
        "mobillama_05b --nodes 20 --gpus a100-80g-2-ports",
        "own.yaml --nodes 20",
        "ladder/shared --nodes 1",
        "recipes/mobillama_05b.yaml",
    )
    planned = run(tmp_path, "-c", script, *named, PYTHONPATH=str(installed))
    assert planned.stdout.endswith("[0, 0, 0, 0, 2]\n"), planned.stderr
    assert f"recipes are in {recipes}" in planned.stderr and "mobillama_05b_chat" in planned.stderr


def test_data_tools_of_a_clone_use_the_installed_core_of_the_same_sources(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "data_tools", tmp_path / "clone" / "data_tools", ignore=BUILT)
    (tmp_path / "segments").mkdir()
    for name in ("train_000.jsonl", "train_001.jsonl"):
        rows = [{"token_ids": [row] * 9, "source": "arxiv"} for row in range(20)]
        (tmp_path / "segments" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = ("clone/data_tools/build_amber.py", "index", "--input", "segments", "--row-length", "9")
    done = run(tmp_path, *index, "--num-segments", "2", "--output", "data", PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    which = "import sys, data_tools.index; print(sys.modules['data_tools.index._core'].__file__)"
    assert run(tmp_path / "clone", "-c", which, PYTHONPATH=str(installed)).stdout.startswith(str(installed))
    assert run(tmp_path, index[0], "verify", "--input", "data", PYTHONPATH=str(installed)).returncode == 0

    with (tmp_path / "clone/data_tools/index/csrc/module.cpp").open("a") as changed:
        changed.write("// another version\n")
    refused = run(tmp_path, *index, "--output", "other", PYTHONPATH=str(installed))
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert f"that of {installed / 'data_tools' / 'index'}" in refused.stderr
    assert f"cd {tmp_path / 'clone'} &&" in refused.stderr and "-m data_tools.build_amber" in refused.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("where", ["clone", "installed"])
def test_a_core_that_is_cut_short_is_named(installed: Path, tmp_path: Path, where: str) -> None:
    """A full disk or a broken copy leaves one; loaded, it ends Python with SIGBUS and no word."""
    core = next((installed / "data_tools/index").glob("_core*.so"))
    for folder in ("clone", "installed"):
        shutil.copytree(ROOT / "data_tools", tmp_path / folder / "data_tools", ignore=BUILT)
    cut = tmp_path / where / "data_tools/index" / core.name
    variables = {"PYTHONPATH": str(tmp_path / "installed")}
    for size in (core.stat().st_size - 1, core.stat().st_size // 2, 40, 0):
        cut.write_bytes(core.read_bytes()[:size])
        refused = run(tmp_path, "clone/data_tools/build_amber.py", "verify", "--input", ".", **variables)
        assert refused.returncode == 1 and "Traceback" not in refused.stderr, refused.stderr
        assert str(cut) in refused.stderr and "cut short" in refused.stderr and "build it again" in refused.stderr
