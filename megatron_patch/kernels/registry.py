"""Which implementation of each kernel this process runs; `choice.py` decides it, the kernels ask here.

Imports nothing of ours, so that kernels, their check and their choice can all stand on it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch

Implementation = Literal["reference", "compiled", "triton"]
Kernel = Literal["loss", "swiglu", "norm", "rotary"]
KERNELS: tuple[Kernel, ...] = ("loss", "swiglu", "norm", "rotary")

_in_use: dict[Kernel, Implementation] = dict.fromkeys(KERNELS, "reference")


def in_use() -> dict[Kernel, Implementation]:
    """What runs now, by kernel; a copy."""
    return dict(_in_use)


def use(chosen: Mapping[Kernel, Implementation]) -> None:
    """From now on these run, unchecked; kernels that `chosen` leaves out stay as they are."""
    _in_use.update(chosen)


@contextlib.contextmanager
def forced(chosen: Mapping[Kernel, Implementation]) -> Iterator[None]:
    """These run, unchecked, while the block lasts."""
    before = in_use()
    use(chosen)
    try:
        yield
    finally:
        use(before)


def implementation(kernel: Kernel, reference: Callable[..., Any], triton: str) -> Callable[..., Any]:
    """The one in use of a kernel's three: the reference, the same compiled, or `module:name` of this package.

    Triton modules are imported when first called for: Triton is absent from installations for the CPU.
    """
    if _in_use[kernel] == "triton":
        return named(triton)
    return _compiled(reference) if _in_use[kernel] == "compiled" else reference


@functools.cache
def named(place: str) -> Callable[..., Any]:
    """The function that `module:name` names in this package."""
    module, name = place.split(":")
    return getattr(importlib.import_module(f"megatron_patch.kernels.{module}"), name)


_compiled = functools.cache(torch.compile)
