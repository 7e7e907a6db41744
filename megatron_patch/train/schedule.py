"""Learning rate by step."""

from __future__ import annotations

import math

from megatron_patch.recipe import Optimizer


def learning_rate(step: int, optimizer: Optimizer, total_steps: int) -> float:
    """LR of 0-based optimizer step: linear warm-up from LR(0)=0, the schedule down to the floor, the floor after.

    cosine (paper section 3.3), between warm-up and end:
        lr(t) = floor + (peak - floor) (1 + cos(pi (t - warmup) / (end - warmup))) / 2
    wsd (warm-up, stable, decay: arXiv 2404.06395; the linear decay of 2405.18392), in the last `cooldown_steps`:
        lr(t) = peak before them, then floor + (peak - floor) (end - t) / cooldown

    `end` is `optimizer.decay_steps`, or `total_steps` where that is null.
    """
    peak, floor, warmup = optimizer.learning_rate, optimizer.min_learning_rate, optimizer.warmup_steps
    end = optimizer.decay_steps or total_steps
    if step < warmup:
        return peak * step / warmup
    if step >= end:
        return floor
    if optimizer.schedule == "wsd":
        return floor + (peak - floor) * min(1.0, (end - step) / optimizer.cooldown_steps)
    progress = (step - warmup) / (end - warmup)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
