"""Every kernel in each of its implementations, and attention's, forward and backward at a recipe's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import TimeIsUp, seconds_a_call
from megatron_patch import device
from megatron_patch.kernels import choice, loss, norm, rotary, swiglu
from megatron_patch.kernels.chunk import CHUNK_TOKENS
from megatron_patch.kernels.weight_gradient import wgrad_gemm_accum_fp32
from megatron_patch.recipe import Recipe


def measure_all(recipe: Recipe, results: dict[str, Any], small: bool) -> None:
    """Append {kernel, by, seconds} to results["kernels"], one implementation after the other."""
    m = recipe.model
    rows, dtype, where = (2 if small else 8), torch.bfloat16, device.current()
    s, h, heads = m.sequence_length, m.hidden_size, m.num_attention_heads
    repeats = 1 if small else 20

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=where, dtype=dtype).requires_grad_()

    def record(kernel: str, by: str, make: Callable[[], Callable[[], Any]]) -> None:
        """Time what `make` returns; an implementation that cannot run here becomes a note."""
        try:
            seconds = seconds_a_call(make(), warmup=2, repeats=repeats)
            results["kernels"].append({"kernel": kernel, "by": by, "seconds": seconds})
        except TimeIsUp:
            raise
        except Exception as error:
            results["notes"].append(f"{kernel} by {by}: {type(error).__name__}: {str(error).splitlines()[0]}")

    def both_ways(function: Callable[..., Any], *inputs: torch.Tensor) -> Callable[[], None]:
        outputs = function(*inputs)
        upstream = [torch.randn_like(t) for t in (outputs if isinstance(outputs, tuple) else (outputs,))]

        def call() -> None:
            outputs = function(*inputs)
            torch.autograd.grad(outputs, [t for t in inputs if t.requires_grad], upstream)

        return call

    packed, x, residual, weight = (
        random(s, rows, 2 * m.ffn_hidden_size),
        random(s, rows, h),
        random(s, rows, h),
        random(h),
    )
    qkv, table = random(s, rows, 3 * h), torch.randn(2, s, m.head_dim // 2, device=where)
    chunk = min(CHUNK_TOKENS, s * rows)
    logits = random(chunk, m.vocab_size).detach()
    labels = torch.randint(m.vocab_size, (chunk,), device=where)

    def one_chunk() -> None:
        maximum, exponentials, _ = loss.row_statistics(logits, labels, 0)
        loss.to_logits_gradient_(logits, labels, 0, maximum + exponentials.log(), maximum)

    cases: dict[str, Callable[[], Any]] = {
        "swiglu": lambda: both_ways(swiglu.swiglu, packed),
        "norm": lambda: both_ways(lambda x, w: norm.rms_norm(x, w, 1e-5), x, weight),
        "norm with sum": lambda: both_ways(lambda x, r, w: norm.add_rms_norm(x, r, w, 1e-5), x, residual, weight),
        "rotary": lambda: both_ways(lambda q: rotary.split_and_rotate(q, table, heads), qkv),
        "loss of a chunk, without GEMMs": lambda: one_chunk,
    }
    decided = {kernel: choice.chosen(kernel) for kernel in choice.ON_GPU}
    try:
        # The compiled one last: its compilation may take what time is left.
        for implementation in ("reference", "triton", "compiled") if device.HAS_GPU else ("reference",):
            try:
                choice.choose(implementation, where)
            except choice.KernelError as error:
                results["notes"].append(str(error))
                continue
            for name, make in cases.items():
                record(name, implementation, make)
    finally:
        choice._chosen.update(decided)

    query, key, value = (random(rows, heads, s, m.head_dim) for _ in range(3))

    def attention() -> Callable[[], None]:
        scaled_dot_product = torch.nn.functional.scaled_dot_product_attention
        return both_ways(lambda q, k, v: scaled_dot_product(q, k, v, is_causal=True), query, key, value)

    if device.HAS_GPU:
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with sdpa_kernel(backend):
                record("attention", backend.name, attention)
    record("attention", "torch's choice", attention)

    main_grad = torch.zeros(2 * m.ffn_hidden_size, h, device=where)
    flat, d_packed = x.detach().flatten(0, 1), packed.detach().flatten(0, 1)
    record(
        "weight gradient of fc1",
        "accumulated in fp32",
        lambda: lambda: wgrad_gemm_accum_fp32(flat, d_packed, main_grad),
    )
    record("weight gradient of fc1", "into a bf16 temporary", lambda: lambda: d_packed.t() @ flat)
