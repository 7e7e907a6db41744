"""The house as its documents draw it: imports run one way, and what a document names is there."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
# A room imports from lower floors alone, never from its own or a higher one (CONTRIBUTING.md). Inside a room no circle.
FLOORS = {
    "megatron_patch": (
        {"recipe", "arguments", "launch", "paper", "results", "kernels"},
        {"parallel", "run"},
        {"vision"},
        {"model"},
        {"optim", "data"},
        {"train", "preflight", "generate"},
        {"convert", "plan"},
        {"evaluate", "devices"},
        {"report"},
        {"__main__"},
    ),
    "data_tools": (
        {"files"},
        {"dataset"},
        {"sources"},
        {"index"},
        {"pack", "chat"},
        {"vision", "build_config", "command_line", "demo_corpus"},
        {"run_all", "packing_options", "demo_conversations", "demo_digits", "debian_corpus"},
        {"build_amber", "build_chat", "build_vision"},
    ),
}
ROOMS = [(package, room) for package, floors in FLOORS.items() for room in sorted(set().union(*floors))]
FOLDERS = ("megatron_patch", "data_tools", "recipes", "slurm", "tests", "benchmarks", "docs")
CODE = {".py", ".pyi", ".cpp", ".h", ".sh", ".sbatch", ".yaml", ".css", ".js"}
# Not asked of git: the tests run from a tarball too, and as a user who does not own the clone.
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")))
)


def imports(file: Path) -> Iterator[str]:
    """Modules of ours that a file imports, wherever in it, as `package.room.module`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in FLOORS:
            for name in node.names:  # `from package.room import module` names the module, or something in the room
                whole = f"{node.module}.{name.name}"
                yield whole if _file(whole) else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] in FLOORS)


def _file(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next(
        (p for p in (path.with_suffix(".py"), path.with_suffix(".pyi"), path / "__init__.py") if p.exists()), None
    )


def test_every_room_has_a_floor() -> None:
    for package, floors in FLOORS.items():
        there = {
            path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
        }
        assert there - {"__init__"} == set().union(*floors)


@pytest.mark.parametrize(("package", "room"), ROOMS)
def test_imports_run_downwards(package: str, room: str) -> None:
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS[package]) for room in rooms}
    path = ROOT / package / room
    for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        used = {name.split(".")[1] for name in imports(file) if name.startswith(f"{package}.")} - {room}
        upwards = {other for other in used if floor_of[other] >= floor_of[room]}
        assert not upwards, f"{file} imports {upwards}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in FLOORS
        for path in (ROOT / package).rglob("*.py")
    }
    graph = {name: set(imports(path)) - {name} for name, path in modules.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_data_tools_know_nothing_of_training() -> None:
    for file in (ROOT / "data_tools").rglob("*.py"):
        assert not [name for name in imports(file) if name.startswith("megatron_patch")], file


def test_a_file_can_be_read_in_one_sitting() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in CODE]
    assert not [f"{path}: {lines}" for path in files if (lines := len(path.read_text().splitlines())) > 400]


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
    dockerfile = (ROOT / "slurm/Dockerfile").read_text()
    image = re.search(r"^FROM nvidia/cuda:(\d+\.\d+)\..*-ubuntu(.*)$", dockerfile, re.MULTILINE)
    admitted = re.search(r'^requires-python = "(.*?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert image is not None and admitted is not None
    assert versions["python"] in SpecifierSet(admitted[1])
    assert {"22.04": "3.10", "24.04": "3.12"}[image[2]] in SpecifierSet(admitted[1]), "the Python of that Ubuntu"
    # apex compiles with exactly the CUDA that torch's wheel is built for.
    assert {image[1]} == {versions[name] for name in ("cuda-nvcc", "cuda-libraries-dev")}
    compiled = [re.findall(r"flash-attn==(\S+)", text) for text in ((ROOT / "environment.yml").read_text(), dockerfile)]
    assert len(compiled[0]) == 1 and compiled[0] == compiled[1]
