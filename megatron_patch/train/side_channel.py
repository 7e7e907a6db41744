"""Small messages between all ranks, beside the training's own collectives.

On GPUs the training's collectives queue on the device; these run on the host over a gloo group of their own, so that a
thread may wait for the slowest disk while training goes on.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class SideChannel:
    """A gloo group over all ranks. Every rank makes it and calls it in the same order; one thread at a time."""

    def __init__(self, timeout: timedelta) -> None:
        """`timeout` is how long a rank may be waited for."""
        self._group = dist.new_group(backend="gloo", timeout=timeout)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Values travel as JSON."""
        message = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self._group.size())]
        dist.all_gather(lengths, torch.tensor([len(message)]), group=self._group)
        longest = max(int(n) for n in lengths)
        messages = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
        dist.all_gather(messages, torch.nn.functional.pad(message, (0, longest - len(message))), group=self._group)
        return [json.loads(bytes(m[: int(n)].tolist())) for m, n in zip(messages, lengths, strict=True)]

    def from_first(self, value: Any) -> Any:
        """Rank 0's value on every rank; what the others pass does not count."""
        return self.gather(value if dist.get_rank() == 0 else None)[0]
