"""Every kernel in each of its implementations, and attention's, forward and backward at a recipe's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import TimeIsUp, seconds_a_call
from megatron_patch.kernels import attention, choice, loss, norm, registry, rotary, swiglu
from megatron_patch.kernels.chunk import CHUNK_TOKENS
from megatron_patch.kernels.weight_gradient import wgrad_gemm_accum_fp32
from megatron_patch.parallel import device
from megatron_patch.recipe import Recipe

Call = Callable[[], Any]


class Kernels:
    """Appends {kernel, by, seconds} to results["kernels"], one implementation after the other."""

    def __init__(self, recipe: Recipe, results: dict[str, Any], small: bool) -> None:
        self._model, self._results = recipe.model, results
        self._rows, self._repeats = (2, 1) if small else (8, 20)

    def ours(self, *implementations: registry.Implementation) -> None:
        """Our kernels."""
        m, s, rows = self._model, self._model.sequence_length, self._rows
        h, where = m.hidden_size, device.current()
        packed, qkv = _random(rows * s, 1, 2 * m.ffn_hidden_size), _random(rows, s, 3 * h)
        x, residual, weight = _random(rows * s, 1, h), _random(rows * s, 1, h), _random(h)
        table = torch.randn(2, s, m.head_dim // 2, device=where)
        chunk = min(CHUNK_TOKENS, s * rows)
        logits = _random(chunk, m.vocab_size).detach()
        labels = torch.randint(m.vocab_size, (chunk,), device=where)

        def one_chunk() -> None:
            maximum, exponentials, _ = loss.row_statistics(logits, labels, 0)
            loss.to_logits_gradient_(logits, labels, 0, maximum + exponentials.log(), maximum)

        cases: dict[str, Callable[[], Call]] = {
            "swiglu": lambda: _both_ways(swiglu.swiglu, packed),
            "norm": lambda: _both_ways(lambda x, w: norm.rms_norm(x, w, 1e-5), x, weight),
            "norm and residual": lambda: _both_ways(lambda x, w: norm.rms_norm_beside(x, w, 1e-5), x, weight),
            "norm with sum": lambda: _both_ways(lambda x, r, w: norm.add_rms_norm(x, r, w, 1e-5), x, residual, weight),
            "rotary": lambda: _both_ways(lambda q: rotary.split_and_rotate(q, table, m.num_attention_heads), qkv),
            "loss of a chunk, without GEMMs": lambda: one_chunk,
        }
        with registry.forced(registry.in_use()):
            for implementation in implementations:
                try:
                    choice.choose(implementation, where)
                except choice.KernelError as error:
                    self._results["notes"].append(str(error))
                    continue
                for name, make in cases.items():
                    self._record(name, implementation, make)

    def libraries(self) -> None:
        """Attention by torch's backends, laid out as the model lays it, and the ways of a weight gradient."""
        m, s, rows = self._model, self._model.sequence_length, self._rows
        heads = [_random(rows, s, m.num_attention_heads, m.head_dim) for _ in range(3)]

        backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if device.HAS_GPU else ()
        for backend in backends:
            with sdpa_kernel(backend):
                self._record("attention", backend.name, lambda: _both_ways(attention.by_torch, *heads))
        ways = [
            ("torch's choice", attention.by_torch, False),
            ("torch's choice, deterministic", attention.by_torch, True),
        ]
        if device.HAS_GPU:
            ways.append(("cuDNN forward, flash backward, deterministic", attention.by_cudnn_and_flash, True))
        for by, way, deterministic in ways:
            torch.use_deterministic_algorithms(deterministic)
            try:
                self._record("attention", by, lambda way=way: _both_ways(way, *heads))
            finally:
                torch.use_deterministic_algorithms(False)

        x, d_packed = _random(s * rows, m.hidden_size).detach(), _random(s * rows, 2 * m.ffn_hidden_size).detach()
        main_grad = torch.zeros(2 * m.ffn_hidden_size, m.hidden_size, device=device.current())
        for by, call in (
            ("accumulated in fp32", lambda: wgrad_gemm_accum_fp32(x, d_packed, main_grad)),
            ("into a bf16 temporary", lambda: d_packed.t() @ x),
        ):
            self._record("weight gradient of fc1", by, lambda call=call: call)

    def _record(self, kernel: str, by: str, make: Callable[[], Call]) -> None:
        """Time what `make` returns; an implementation that cannot run here becomes a note."""
        try:
            seconds = seconds_a_call(make(), warmup=2, repeats=self._repeats)
            self._results["kernels"].append({"kernel": kernel, "by": by, "seconds": seconds})
        except TimeIsUp:
            raise
        except Exception as error:
            said = (str(error).splitlines() or [""])[0]
            self._results["notes"].append(f"{kernel} by {by}: {type(error).__name__}: {said}")


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device.current(), dtype=torch.bfloat16).requires_grad_()


def _both_ways(function: Callable[..., Any], *inputs: torch.Tensor) -> Call:
    outputs = function(*inputs)
    upstream = [torch.randn_like(t) for t in (outputs if isinstance(outputs, tuple) else (outputs,))]

    def call() -> None:
        outputs = function(*inputs)
        torch.autograd.grad(outputs, [t for t in inputs if t.requires_grad], upstream)

    return call
