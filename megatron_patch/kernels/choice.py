"""Which implementation of each kernel this process runs: the one place that decides.

Every kernel has a plain-torch reference, the same reference compiled by torch.compile, and a Triton version. A recipe
says `kernels: auto` (the table below on a GPU, the reference on a CPU) or names one implementation for all of them.
The choice is made once, before the model is built, and checked by numbers (kernels/check.py): a kernel that does not
compile or does not agree with its reference on this device is never used silently. The kernels ask
`registry.py`, which holds the decision.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Literal

import torch

from megatron_patch.kernels import attention, check, registry, weight_gradient
from megatron_patch.kernels.registry import Implementation, Kernel

ON_GPU: dict[Kernel, Implementation] = {"loss": "triton", "swiglu": "triton", "norm": "triton", "rotary": "triton"}

HOPPER = 9  # the generation on which cuDNN's attention was measured to be faster than flash attention
MIXED_HEAD_SIZES = (64, 80)  # of the 0.5B, of the 0.8B: those it was measured for


class KernelError(RuntimeError):
    """An implementation that was asked for cannot run here: names the kernel, the reason and the remedy."""


def choose(wanted: Literal["auto"] | Implementation, device: torch.device) -> dict[Kernel, Implementation]:
    """Decide for this process and return the decision.

    Under `auto` on a GPU, a Triton kernel that fails its check is replaced by the compiled reference, and where that
    fails too (both need a C compiler) by the reference, with a warning that gives the reasons; so is the fastest way to
    accumulate weight gradients in fp32 by a slower one, and deterministic attention, where that is asked for. Raises
    KernelError where an implementation that was named cannot run, or where no way to accumulate weight gradients is
    right.
    """
    if device.type == "cuda":
        choose_weight_gradient(device)
        if torch.are_deterministic_algorithms_enabled():
            choose_attention(device)
    wishes = dict.fromkeys(ON_GPU, wanted) if wanted != "auto" else ON_GPU
    registry.use(dict.fromkeys(ON_GPU, "reference"))
    if wanted == "reference" or (wanted == "auto" and device.type != "cuda"):
        return registry.in_use()
    accepted: dict[Kernel, Implementation] = {}
    for kernel, wish in wishes.items():
        faults: list[str] = []
        candidates: tuple[Implementation, ...] = (wish, "compiled") if wanted == "auto" else (wish,)
        for candidate in candidates:
            fault = _unavailable(candidate, device) or check.difference(kernel, candidate, device)
            if fault is None:
                accepted[kernel] = candidate
                break
            faults.append(f"{candidate}: {fault}")
        if faults and wanted != "auto":
            raise KernelError(f"kernel {kernel} cannot run here as {faults[0]}; use kernels=auto or =reference")
        if faults:
            taken = accepted.get(kernel, "reference")
            warnings.warn(f"kernel {kernel} runs as {taken}, which is slower: {'; '.join(faults)}", stacklevel=2)
    registry.use(accepted)
    return registry.in_use()


def choose_weight_gradient(device: torch.device) -> str:
    """Take the fastest way to accumulate weight gradients that is right on this device; its name."""
    faults: list[str] = []
    for way, accumulate in weight_gradient.ON_GPU.items():
        fault = check.weight_gradient_difference(accumulate, device)
        if fault is None:
            weight_gradient.use(way)
            if faults:
                warnings.warn(f"weight gradients are accumulated by {way}: {'; '.join(faults)}", stacklevel=3)
            return way
        faults.append(f"{way}: {fault}")
    raise KernelError(f"weight gradients cannot be accumulated in fp32 here: {'; '.join(faults)}")


def choose_attention(device: torch.device) -> list[int]:
    """Let deterministic attention take cuDNN's forward on Hopper, for the head sizes at which that is right; those."""
    right: list[int] = []
    if torch.cuda.get_device_capability(device)[0] == HOPPER:
        for head_size in MIXED_HEAD_SIZES:
            fault = check.attention_difference(head_size, device)
            if fault is None:
                right.append(head_size)
            else:
                said = f"deterministic attention of head size {head_size} runs as torch's, which is slower: {fault}"
                warnings.warn(said, stacklevel=3)
    attention.mix_for(frozenset(right))
    return right


def _unavailable(wish: Implementation, device: torch.device) -> str | None:
    if wish == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton, in the version that torch pins)"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton needs a GPU, or TRITON_INTERPRET=1 to be interpreted"
    return None
