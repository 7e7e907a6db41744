"""RUN/plan.json, which `plan --save` writes: what the run was to reach."""

from __future__ import annotations

from pathlib import Path

from megatron_patch.launch import read_json
from megatron_patch.run.log import is_number

PLAN_NAME = "plan.json"


def against_plan(run: Path, tokens_per_second: float, ranks: int | None) -> str | None:
    """A measured rate of the job beside the planned one; None where nothing was planned, or for other ranks."""
    plan = read_json(run / PLAN_NAME)
    planned = plan.get("tokens_per_second")
    if not is_number(planned) or planned <= 0:
        return None
    if ranks is not None and plan.get("ranks") != ranks:
        return f"made for {plan.get('ranks')} ranks, not {ranks}; plan again with --save"
    return f"{planned:,.0f} tokens/s on {plan.get('hardware')}; {tokens_per_second / planned:.1%} of it reached"
