"""The house as its documents draw it: imports run one way, and what a document names is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
# A room imports from lower floors alone, never from its own or a higher one (CONTRIBUTING.md).
FLOORS = (
    {"recipe", "arguments", "gpus", "launch", "log_file", "milestone_table", "paper", "run_lock", "results"},
    {"counts", "device", "attempts", "judge", "kernels"},
    {"patches", "model"},
    {"topology", "data", "groups"},
    {"gradients", "weights"},
    {"zero", "memory"},
    {"train"},
    {"convert", "generate", "plan", "preflight", "status", "loss_compare"},
    {"evaluate", "summary"},
    {"report"},
    {"__main__"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FOLDERS = ("megatron_patch", "data_tools", "recipes", "slurm", "tests", "benchmarks", "docs")
# Not asked of git: the tests run from a tarball too, and as a user who does not own the clone.
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")))
)


def imports(file: Path) -> Iterator[str]:
    """Modules of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "megatron_patch":
            yield from (f"megatron_patch.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def rooms() -> list[str]:
    return sorted({path.stem for path in (ROOT / "megatron_patch").iterdir() if path.suffix == ".py" or path.is_dir()})


def test_every_room_has_a_floor() -> None:
    assert {room for room in rooms() if room not in ("__init__", "__pycache__", "README")} == set(FLOOR_OF)


@pytest.mark.parametrize("room", sorted(FLOOR_OF))
def test_imports_run_downwards(room: str) -> None:
    path = ROOT / "megatron_patch" / room
    for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        used = {name.split(".")[1] for name in imports(file) if name.startswith("megatron_patch.")} - {room}
        upwards = {other for other in used if FLOOR_OF[other] >= FLOOR_OF[room]}
        assert not upwards, f"{file} imports {upwards}"


def test_the_data_tools_know_nothing_of_training() -> None:
    for file in (ROOT / "data_tools").rglob("*.py"):
        assert not [name for name in imports(file) if name.startswith("megatron_patch")], file


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_names_what_is_there(document: str) -> None:
    """Links, and paths in backticks that begin with a folder of the repository."""
    text, folder = (ROOT / document).read_text(), (ROOT / document).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert not [link for link in links if not (folder / link).exists()]
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./]*\w/?)`", text)
    assert not [name for name in named if "NAME" not in name and "SUBJECT" not in name and not (ROOT / name).exists()]


def test_where_to_change_what_is_where_it_says() -> None:
    """Files of the table are there, and what else a row has in backticks stands in one of them."""
    package = ROOT / "megatron_patch"
    table = re.findall(r"^\| .*`.*$", (package / "README.md").read_text(), re.MULTILINE)
    assert len(table) >= 9
    for row in table:
        quoted = re.findall(r"`([^`]+)`", row)
        paths = [name for name in quoted if re.search(r"\.(py|yaml)$|/$", name)]
        places = [next(p for p in (package / path, ROOT / path) if p.exists()) for path in paths]
        text = "".join(place.read_text() for place in places if place.is_file())
        words = {part for name in quoted if name not in paths for part in name.split(".")}
        assert places and not [word for word in words if not re.search(rf"\b{word}\b", text)], row


def test_conda_and_the_image_install_what_is_pinned_and_tested() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    versions = dict(package.split("=") for package in conda if "=" in package)
    assert pip["pip"][:2] == ["-c constraints.txt", "-e .[eval]"]
    pins = (ROOT / "constraints.txt").read_text() + (ROOT / "pyproject.toml").read_text()
    assert not [package for package in pip["pip"][2:] if package not in pins], "repeated, not decided, here"
    image = re.search(r"^FROM nvidia/cuda:(\d+)\..*-ubuntu(.*)$", (ROOT / "slurm/Dockerfile").read_text(), re.MULTILINE)
    admitted = re.search(r'^requires-python = "(.*?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert image is not None and admitted is not None
    assert versions["python"] in SpecifierSet(admitted[1])
    assert {"22.04": "3.10", "24.04": "3.12"}[image[2]] in SpecifierSet(admitted[1]), "the Python of that Ubuntu"
    assert {image[1]} == {versions[name].split(".")[0] for name in ("cuda-nvcc", "cuda-libraries-dev")}
