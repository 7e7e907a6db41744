"""Builds the C++ core of data_tools; everything else stands in pyproject.toml."""

from __future__ import annotations

import os
import sys

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError, LinkError

# AMBER_CXXFLAGS is for builds under a sanitizer (make asan). No -march here: the core chooses at run time.
EXTRA_FLAGS = os.environ.get("AMBER_CXXFLAGS", "").split()
SOURCES = ["module", "row_parser", "json_line", "ids_portable", "ids_avx2", "ids_avx512"]


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
    cmdclass={"build_ext": BuildCore},
)
