"""Builds the C++ core of data_tools and puts the recipes into the package; everything else stands in pyproject.toml."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

# AMBER_CXXFLAGS is for builds under a sanitizer (make asan). No -march here: the core chooses at run time.
EXTRA_FLAGS = os.environ.get("AMBER_CXXFLAGS", "").split()
SOURCES = ["module", "row_parser", "json_line", "ids_portable", "ids_avx2", "ids_avx512"]


class BuildPackages(build_py):
    """The recipes lie beside the packages in the repository, and in `megatron_patch/recipes` where it is installed."""

    def run(self) -> None:
        super().run()
        if self.editable_mode or "megatron_patch" not in self.packages:
            return
        recipes = sorted(Path("recipes").rglob("*.yaml"))
        if not recipes:
            sys.exit(
                "error: no recipes/*.yaml beside setup.py; an installed megatron_patch needs them: copy the folder"
            )
        for recipe in recipes:
            installed = Path(self.build_lib, "megatron_patch", recipe)
            self.mkpath(str(installed.parent))
            self.copy_file(str(recipe), str(installed))


class BuildCore(build_ext):
    """Says what to install where there is no C++ compiler."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except (CompileError, LinkError, OSError) as error:
            sys.exit(
                f"error: cannot build the C++ core of data_tools: {error}\n"
                "It needs a C++17 compiler and Python's headers. Install them (Debian: apt-get install g++\n"
                "python3-dev, conda: gxx_linux-64), or name your compiler with CXX, then run pip install again."
            )


setup(
    ext_modules=[
        Pybind11Extension(
            "data_tools.index._core",
            [f"data_tools/index/csrc/{name}.cpp" for name in SOURCES],
            depends=["data_tools/index/csrc/row_parser.h", "data_tools/index/csrc/separators.h"],
            cxx_std=17,
            extra_compile_args=["-O3", "-g0", *EXTRA_FLAGS],
            extra_link_args=EXTRA_FLAGS,
        )
    ],
    cmdclass={"build_ext": BuildCore, "build_py": BuildPackages},
)
