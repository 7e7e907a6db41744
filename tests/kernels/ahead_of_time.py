"""Compile every Triton kernel for GPUs that are not here, at the recipes' real shapes, and say what ptxas made of it.

    python -m tests.kernels.ahead_of_time [--json]

The launches are those of training: kernels are called with tensors that have a shape and no storage, Triton is given
a GPU that it cannot find, and each launch ends where the compiler does. So every specialisation (types, strides,
divisibility by 16, constants, warps) is the one that a step would ask for. Needs a process in which Triton has not
been imported as an interpreter.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megatron_patch.kernels import check, registry, triton_loss, triton_norm, triton_rotary, triton_swiglu
from megatron_patch.kernels.chunk import CHUNK_TOKENS
from megatron_patch.recipe import Recipe, load

ARCHITECTURES = (80, 90)  # A100; H100 and H200
META = torch.device("meta")


@dataclass(frozen=True)
class Compiled:
    """One kernel for one GPU."""

    case: str
    kernel: str
    architecture: int
    warps: int
    registers: int  # of a thread
    spilled: int  # bytes of a thread that went to memory for want of registers, stores and loads
    shared: int  # bytes of a program


class AbsentGPU:
    """What Triton asks of a driver before it launches."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, 32)

    def get_current_device(self) -> int:
        return self._architecture  # Triton keeps what it compiled by the number of the device

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(recipe: Recipe, precision: torch.dtype) -> Iterator[str]:
    """Call every kernel as a step of the recipe does; yields what was called, each time after the call."""
    m, tensor = recipe.model, recipe.parallel.tensor
    s, b = m.sequence_length, recipe.batch.micro_batch_size

    def empty(*shape: int, dtype: torch.dtype = precision) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=META).requires_grad_(dtype.is_floating_point)

    def both_ways(outputs: Any) -> None:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])

    logits, labels = empty(CHUNK_TOKENS, m.vocab_size // tensor).detach(), empty(CHUNK_TOKENS, dtype=torch.int64)
    first_label = m.vocab_size // tensor * (tensor - 1)
    maximum, _, log_sum = triton_loss.row_statistics(logits, labels, first_label)
    triton_loss.to_logits_gradient_(logits, labels, first_label, log_sum, maximum)
    yield "loss"
    both_ways(triton_swiglu.swiglu(empty(b * s, 1, 2 * m.ffn_hidden_size // tensor)))
    yield "swiglu"
    both_ways(triton_norm.rms_norm(empty(b * s, 1, m.hidden_size), empty(m.hidden_size), m.norm_epsilon))
    both_ways(triton_norm.rms_norm_beside(empty(b * s, 1, m.hidden_size), empty(m.hidden_size), m.norm_epsilon))
    both_ways(
        triton_norm.add_rms_norm(
            empty(b * s, 1, m.hidden_size), empty(b * s, 1, m.hidden_size), empty(m.hidden_size), m.norm_epsilon
        )
    )
    yield "norm"
    table = torch.empty(2, s, m.head_dim // 2, device=META)
    both_ways(
        triton_rotary.split_and_rotate(empty(b, s, 3 * m.hidden_size // tensor), table, m.num_attention_heads // tensor)
    )
    yield "rotary"


def checks() -> Iterator[str]:
    """Call every kernel as the check at start does (kernels/check.py)."""
    for kernel, case in check.CASES.items():
        with registry.forced({kernel: "triton"}):
            for _ in case(META):
                pass
        yield kernel


def compile_all(architecture: int) -> list[Compiled]:
    """Every kernel at every shape, each once."""
    driver.set_active(AbsentGPU(architecture))
    fresh: list[Any] = []
    real = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        fresh.append(real(self, *args, grid=grid, warmup=True, **kwargs))

    done: dict[str, Compiled] = {}
    JITFunction.run = compile_only
    try:
        for case, calls in cases():
            for _ in calls:
                for kernel in fresh:
                    done.setdefault(kernel.hash, resources(case, kernel, architecture))
                fresh.clear()
    finally:
        JITFunction.run = real
    return list(done.values())


def cases() -> Iterator[tuple[str, Iterator[str]]]:
    for name in ("mobillama_05b", "mobillama_08b"):  # large-base has the shapes of the 0.5B
        for tensor in (1, 2):
            recipe = load(f"recipes/{name}.yaml", [f"parallel.tensor={tensor}"])
            yield f"{name}, TP{tensor}", launches(recipe, torch.bfloat16)
    yield "mobillama_05b, fp32", launches(load("recipes/mobillama_05b.yaml"), torch.float32)
    yield "check at start", checks()


def resources(case: str, kernel: Any, architecture: int) -> Compiled:
    """ptxas's own account of a kernel, from the code that Triton generated."""
    suffix = "a" if architecture >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        said = subprocess.run(
            [
                *(triton.knobs.nvidia.ptxas.path, "-v", "--regAllocOptLevel=2"),
                *(f"--gpu-name=sm_{architecture}{suffix}", str(source), "-o", str(source.with_suffix(".cubin"))),
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert spills and registers, said
    return Compiled(
        case,
        f"{Path(kernel.src.fn.fn.__code__.co_filename).stem}.{kernel.metadata.name.lstrip('_')}",
        architecture,
        kernel.metadata.num_warps,
        int(registers[1]),
        int(spills[1]) + int(spills[2]),
        kernel.metadata.shared,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one list, for programs")
    args = parser.parse_args()
    compiled = [c for architecture in ARCHITECTURES for c in compile_all(architecture)]
    if args.json:
        json.dump([asdict(c) for c in compiled], sys.stdout)
        return
    print(f"Triton {triton.__version__}\n\n| kernel | GPU | case | warps | registers | spilled | shared bytes |")
    print("|---|---|---|---:|---:|---:|---:|")
    for c in sorted(compiled, key=lambda c: (c.kernel, c.architecture, c.case)):
        print(f"| {c.kernel} | sm_{c.architecture} | {c.case} | {c.warps} | {c.registers} | {c.spilled} | {c.shared} |")


if __name__ == "__main__":
    main()
