"""RUN/plan.json, which `plan --save` writes: what the run was to reach, beside what it does reach."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_patch.launch import read_json
from megatron_patch.run.energy import Energy, Site
from megatron_patch.run.log import is_number
from megatron_patch.run.pace import Pace

PLAN_NAME = "plan.json"
APART = 0.1
"""A run has parted from its plan where its rate is further from it than this share, and stays so."""


def against_plan(
    run: Path, tokens_per_second: float, ranks: int | None, rates: Sequence[tuple[int, float]] = ()
) -> str | None:
    """A measured rate of the job beside the planned one; None where nothing was planned, or for other ranks.

    With the step from which on the `rates` (Pace) are apart from the plan, where they are.
    """
    plan = read_json(run / PLAN_NAME)
    planned = plan.get("tokens_per_second")
    if not is_number(planned) or planned <= 0:
        return None
    if ranks is not None and plan.get("ranks") != ranks:
        return f"made for {plan.get('ranks')} ranks, not {ranks}; plan again with --save"
    reached = f"{planned:,.0f} tokens/s on {plan.get('hardware')}; {tokens_per_second / planned:.1%} of it reached"
    return reached + _parting([(step, rate / planned) for step, rate in rates])


def _parting(shares: Sequence[tuple[int, float]]) -> str:
    """Of shares of the plan by step: since when they have been below it, or above."""
    if not shares or abs(shares[-1][1] - 1) <= APART:
        return ""
    is_below = shares[-1][1] < 1
    since = shares[-1][0]
    for step, share in reversed(shares):
        if (1 - share if is_below else share - 1) <= APART:
            break
        since = step
    return f", {f'below {1 - APART:.0%}' if is_below else f'above {1 + APART:.0%}'} since step {since:,}"


def measured_energy(run: Path, pace: Pace) -> str | None:
    """What the GPUs drew in the steps of a run, beside what was planned for these; None where it was not measured."""
    if not pace.metered:
        return None
    plan = read_json(run / PLAN_NAME)
    pue, grid, kwh, tokens = (plan.get(key) for key in ("pue", "grid", "kwh", "tokens"))
    energy = Energy(pace.joules, Site(pue, grid) if is_number(pue) and is_number(grid) else Site())
    text = f"{energy} drawn by the GPUs in {pace.metered:,.0f} of {pace.steps:,} steps"
    if is_number(kwh) and is_number(tokens) and kwh > 0 and tokens > 0 and pace.tokens_a_step:
        planned = kwh / tokens * pace.metered * pace.tokens_a_step
        text += f"; {energy.kwh / planned:.1%} of the {planned:,.4g} kWh planned for these"
    return text
