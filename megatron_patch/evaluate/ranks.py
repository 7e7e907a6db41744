"""Rank 0 decides for all ranks of an evaluation: which model, which tasks, whether to go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_patch.evaluate.data import EvaluationError

T = TypeVar("T")


def is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def on_first_rank(decide: Callable[[], T]) -> T:
    """On every rank what `decide` returns on rank 0.

    Raises EvaluationError on every rank where it raises a ValueError there.
    """
    answer: list[Any] = [None, None]
    if is_first_rank():
        try:
            answer[0] = decide()
        except ValueError as error:
            answer[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise EvaluationError(answer[1])
    return answer[0]
