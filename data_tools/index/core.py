"""Where the C++ core comes from: this folder, or an installed package that was built from the same sources.

A container has the package installed and a clone of the repository mounted, in which nobody builds.
"""

from __future__ import annotations

import importlib.util
import struct
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from data_tools.files.errors import DataError

HERE = Path(__file__).resolve().parent
MODULE = "data_tools.index._core"


def provide() -> None:
    """Make `data_tools.index._core` importable.

    Raises DataError where none is built from these sources, or where the built file is cut short.
    """
    if MODULE in sys.modules or _built(HERE):
        return
    others = []
    for folder in _installed():
        if folder == HERE or (core := _built(folder)) is None:
            continue
        if _sources(folder) != _sources(HERE):
            others.append(str(folder))
            continue
        spec = importlib.util.spec_from_file_location(MODULE, core)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[MODULE] = module
        return
    why = f"; that of {', '.join(others)} was built from other sources than csrc/ here" if others else ""
    python, clone = sys.executable, HERE.parent.parent
    remedy = f"build it, which needs a C++17 compiler: cd {clone} && {python} -m pip install --no-deps -e ."
    if others:
        remedy += f"; or use the installed tools, from a folder outside {clone}: {python} -m data_tools.build_amber"
    raise DataError(f"the C++ core is not built for this Python{why}", file=HERE, remedy=remedy)


def _installed() -> list[Path]:
    """Every `data_tools/index` that this Python can see, `pip install -e` of another clone included."""
    packages = [Path(entry, "data_tools") for entry in sys.path]
    for finder in sys.meta_path:  # an editable install is a finder of its own, behind sys.path
        if (spec := finder.find_spec("data_tools", None)) is not None:
            packages += map(Path, spec.submodule_search_locations or ())
    return list(dict.fromkeys((package / "index").resolve() for package in packages))


def _built(folder: Path) -> Path | None:
    core = next((core for suffix in EXTENSION_SUFFIXES if (core := folder / f"_core{suffix}").is_file()), None)
    if core is not None and not _is_whole(core):
        package = folder.parent.parent
        build = f"cd {package} && {sys.executable} -m pip install --no-deps --force-reinstall -e ."
        if not (package / "setup.py").is_file():
            build = "install the package again, with --force-reinstall"
        raise DataError(
            "this built C++ core is cut short and would end Python with a bus error",
            file=core,
            remedy=f"remove it and build it again: {build}",
        )
    return core


def _is_whole(core: Path) -> bool:
    """Whether an ELF file of 64 bits reaches to its end, which the table of its sections is (gABI, ELF header)."""
    with core.open("rb") as stream:
        header = stream.read(64)
    if not header.startswith(b"\x7fELF"):
        return sys.platform != "linux"  # other systems have other forms
    if len(header) < 64:
        return False
    (table,) = struct.unpack_from("<Q", header, 0x28)
    size, count = struct.unpack_from("<HH", header, 0x3A)
    return core.stat().st_size >= table + size * count


def _sources(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for kind in ("*.cpp", "*.h") for file in (folder / "csrc").glob(kind)}
