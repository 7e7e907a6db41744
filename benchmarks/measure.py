"""How the GPU benchmark measures: time of queued work, the card's ceilings, where the time of a step goes."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_patch.parallel import device
from megatron_patch.recipe import Model

PARTS = (
    "attention",
    "FFN GEMMs",
    "projections",
    "logits and loss",
    "norms and element-wise",
    "optimizer and gradients",
)
PROFILERS_OWN = ("Command Buffer Full",)  # CUPTI's note of a full queue, which repeats kernels of operators
LONGEST = 40  # kernels that a breakdown names
GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm")
LOSS_NAMES = ("row_statistics", "logits_gradient", "linearcrossentropy", "cross_entropy", "nll_loss", "log_softmax")
ATTENTION_NAMES = ("attention", "flash", "fmha", "sdpa", "softmax")


def commit() -> str:
    """The revision that a result is of: COMMIT where it is set, else what git says of the working folder."""
    if named := os.environ.get("COMMIT"):  # of a copy whose git folder is absent or another's
        return named
    answer = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


class TimeIsUp(RuntimeError):
    """A case did not end within its share of the benchmark's time."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in the body once `seconds` or an outer limit's are over, also in a compiler."""
    outer_left, _ = signal.getitimer(signal.ITIMER_REAL)
    if outer_left:
        seconds = min(seconds, outer_left)

    def on_alarm(*_: Any) -> None:
        raise TimeIsUp(f"stopped after {seconds:.0f} s")

    start = time.monotonic()
    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if outer_left:
            signal.setitimer(signal.ITIMER_REAL, max(outer_left - (time.monotonic() - start), 0.01))


def seconds_a_call(function: Callable[[], Any], warmup: int, repeats: int) -> float:
    """Mean wall time of a call over `repeats` calls queued one after the other, after `warmup` calls."""
    for _ in range(warmup):
        function()
    start = device.synchronized_time()
    for _ in range(repeats):
        function()
    return (device.synchronized_time() - start) / repeats


def ceilings(size: int, copied_bytes: int) -> dict[str, float]:
    """What this device reaches: FLOP/s of a bf16 matmul of `size` cubed on random data, bytes/s of a device copy.

    A copy reads and writes: both count.
    """
    where = device.current()
    a, b = (torch.randn(size, size, device=where).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    matmul = seconds_a_call(lambda: torch.mm(a, b, out=out), warmup=5, repeats=20)
    source = torch.empty(copied_bytes, dtype=torch.uint8, device=where).random_()
    target = torch.empty_like(source)
    copy = seconds_a_call(lambda: target.copy_(source), warmup=3, repeats=20)
    return {"matmul_flops": 2 * size**3 / matmul, "copy_bytes_per_second": 2 * copied_bytes / copy}


def release() -> None:
    """Give back what the last case held and start the count of peak memory anew."""
    gc.collect()
    torch._dynamo.reset()
    if device.HAS_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def breakdown(step: Callable[[], Any], model: Model) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Seconds of device time of one call of `step` by part, with `busy`, their sum; and its longest kernels.

    A kernel is given with the operator that launched it, the operator's input shapes, its calls and their seconds.

    GEMMs are told apart by the sizes of their operands, which differ for every matrix of the model. Gaps are what a
    step's wall time (without the profiler) has beyond `busy`. On a CPU the same, of the operators' own time.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.HAS_GPU:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        step()
        device.synchronized_time()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CPU]
    if not device.HAS_GPU:
        seconds: dict[str, float] = defaultdict(float)
        for event in events:
            seconds[part_of(event, "", model)] += event.self_cpu_time_total / 1e6
        return _with_sum(seconds), []
    return device_time(events, model)


def device_time(events: Iterable[Any], model: Model) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """What `breakdown` returns, of the kernels that the host's operators in a profile launched."""
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.name in PROFILERS_OWN:
            continue
        for kernel in event.kernels:
            if kernel.name == event.name:  # a range of the host's, shown on the device: no kernel of its own
                continue
            seconds[part_of(event, kernel.name, model)] += kernel.duration / 1e6
            calls[event.name, kernel.name, str(event.input_shapes)].append(kernel.duration / 1e6)
    longest = sorted(calls.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    kernels = [
        {"operator": operator, "kernel": kernel, "shapes": shapes, "calls": len(each), "seconds": sum(each)}
        for (operator, kernel, shapes), each in longest
    ]
    return _with_sum(seconds), kernels


def _with_sum(seconds: dict[str, float]) -> dict[str, float]:
    return {**{part: seconds[part] for part in PARTS}, "busy": sum(seconds.values())}


def part_of(event: Any, kernel_name: str, model: Model) -> str:
    """The part of the step to which an operator of the profile, or a kernel it launched, belongs."""
    ancestor = event
    while ancestor is not None:
        if ancestor.name in ("optimizer", "aten::_fused_adamw_") or ancestor.name.startswith("Optimizer."):
            return "optimizer and gradients"
        ancestor = ancestor.cpu_parent
    names = f"{event.name} {kernel_name}".lower()
    if any(name in names for name in LOSS_NAMES) and event.name not in GEMMS:
        return "logits and loss"
    if event.name in GEMMS:
        sizes = {n for shape in event.input_shapes if isinstance(shape, list) for n in shape if isinstance(n, int)}
        if model.vocab_size in sizes:
            return "logits and loss"
        if sizes & {model.ffn_hidden_size, 2 * model.ffn_hidden_size}:
            return "FFN GEMMs"
        return "attention" if event.name in ("aten::bmm", "aten::baddbmm") else "projections"
    if any(name in names for name in ATTENTION_NAMES):
        return "attention"
    return "norms and element-wise"
