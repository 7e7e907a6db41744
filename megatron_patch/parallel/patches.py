"""Everything that is changed in Megatron-Core at run time, in one place, with the reason beside it.

megatron-core is pinned to 0.16.1; each patch names the function it replaces so that a newer release can be checked.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import layers, random

from megatron_patch.kernels.embedding import embedding
from megatron_patch.kernels.weight_gradient import wgrad_gemm_accum_fp32
from megatron_patch.parallel import device


def apply() -> None:
    """Patch Megatron-Core for this process; harmless when repeated."""
    _accumulate_weight_gradients_in_fp32()
    if not device.HAS_GPU:
        _run_without_cuda()


def _accumulate_weight_gradients_in_fp32() -> None:
    # mcore's linear layers add the weight gradient to `weight.main_grad` inside the GEMM only where apex is
    # installed. The shared FFN needs that everywhere (kernels/weight_gradient.py), so ours takes apex's place.
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=wgrad_gemm_accum_fp32)
    layers._grad_accum_fusion_available = True
    # VocabParallelEmbedding takes its rows by this function, the only one of torch's functional module in its file.
    layers.F = SimpleNamespace(embedding=embedding)


class _TorchOnCpu:
    """The torch module for pipeline_parallel.schedules, which creates its token counter on a literal "cuda"."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **{**kwargs, "device": "cpu"})


def _run_without_cuda() -> None:
    # mcore asks CUDA for the current device (p2p buffers, vocabulary ranges, rotary cache) and for random states
    # (recompute forks them, though MobiLlama has no dropout). Each answer comes from the CPU instead.
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    schedules.torch = _TorchOnCpu()
