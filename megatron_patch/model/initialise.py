"""Initialisation as a function of (seed, parameter name), so that every layout starts from the same numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from megatron_patch.model.parameters import Whole, local_parameters
from megatron_patch.recipe import Model


def initial_value(whole: Whole, seed: int, std: float) -> torch.Tensor:
    """The whole tensor in fp32 on the CPU: a constant, ones for a norm, else N(0, std) as in the released code."""
    constant = 1.0 if whole.kind == "norm" else whole.constant
    if constant is not None:
        return torch.full(whole.shape, constant)
    digest = hashlib.sha256(f"{seed}:{whole.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(whole.shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def fill(
    chunks: Sequence[torch.nn.Module],
    model: Model,
    value: Callable[[Whole], torch.Tensor],
    tensor_rank: int,
    tensor_size: int,
) -> None:
    """Set this rank's parameters in place to their parts of the whole tensors that `value` gives, one at a time."""
    for whole, parameter in local_parameters(chunks, model):
        parameter.copy_(whole.part(value(whole), tensor_rank, tensor_size).reshape(parameter.shape))


def initialise(chunks: Sequence[torch.nn.Module], model: Model, seed: int, tensor_rank: int, tensor_size: int) -> None:
    """Fill this rank's parameters with `initial_value`."""
    fill(chunks, model, lambda whole: initial_value(whole, seed, model.init_std), tensor_rank, tensor_size)
