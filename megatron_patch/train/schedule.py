"""Learning rate by step."""

from __future__ import annotations

import math

from megatron_patch.recipe import Optimizer


def learning_rate(step: int, optimizer: Optimizer, total_steps: int) -> float:
    """LR of 0-based optimizer step: linear warm-up from LR(0)=0, cosine to the floor, floor after (paper section 3.3).

    lr(t) = peak t / warmup for t < warmup, then
    lr(t) = floor + (peak - floor) (1 + cos(pi (t - warmup) / (end - warmup))) / 2.
    """
    peak, floor, warmup = optimizer.learning_rate, optimizer.min_learning_rate, optimizer.warmup_steps
    end = optimizer.decay_steps or total_steps
    if step < warmup:
        return peak * step / warmup
    if step >= end:
        return floor
    progress = (step - warmup) / (end - warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
