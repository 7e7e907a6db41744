"""Where the C++ core comes from: this folder, or an installed package that was built from the same sources.

A container has the package installed and a clone of the repository mounted, in which nobody builds.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from data_tools.files.errors import DataError

HERE = Path(__file__).resolve().parent
MODULE = "data_tools.index._core"


def provide() -> None:
    """Make `data_tools.index._core` importable. Raises DataError where there is none for these sources."""
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
    return next((core for suffix in EXTENSION_SUFFIXES if (core := folder / f"_core{suffix}").is_file()), None)


def _sources(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for kind in ("*.cpp", "*.h") for file in (folder / "csrc").glob(kind)}
