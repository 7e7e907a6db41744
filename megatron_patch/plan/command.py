"""What a run needs, before it is submitted: `python -m megatron_patch plan RECIPE --nodes 20 --gpus a100-80g-2-ports`.

Every number is computed from the recipe's shapes (counts.py, memory.py, network.py) and from rates that stand with
their sources in parallel/gpus.py, collectives.py and compute.py and are printed beside it; what does not fit is
refused. Without a recipe, the paper's five models stand side by side.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_patch import recipe
from megatron_patch.arguments import amount, counts, file
from megatron_patch.launch import write_json
from megatron_patch.parallel.gpus import GIB
from megatron_patch.plan import scale
from megatron_patch.plan.hardware import add_hardware, hardware
from megatron_patch.plan.memory import memory
from megatron_patch.plan.plan import Plan
from megatron_patch.plan.table import draw, table
from megatron_patch.plan.text import text
from megatron_patch.recipe import RecipeError
from megatron_patch.run import energy
from megatron_patch.run.energy import add_energy
from megatron_patch.run.planned import PLAN_NAME


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", type=Path, nargs="?", help="a file or name of recipes/; none: the paper's models in a table"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    add_hardware(parser)
    parser.add_argument(
        "--restart-minutes", type=amount, default=5, help="assumed loss a restart, beside redone steps (5)"
    )
    add_energy(parser)
    parser.add_argument("--scale", type=counts, metavar="N,N,...", help="a table and a curve over numbers of nodes")
    parser.add_argument("--output", type=file, help="picture of --scale (scaling_NAME.svg), or of the models' table")
    parser.add_argument(
        "--save", action="store_true", help="write RUN/plan.json, beside which `status` and `report` set what they find"
    )


def main(args: argparse.Namespace) -> int:
    """Print the plan. Exit code 2: the recipe cannot be run so, with the reason."""
    try:
        on = hardware(args)
        if args.recipe is None:
            print(table(on))
            if args.output:
                draw(on, args.output)
            return 0
        settings = recipe.load(args.recipe, args.overrides)
        if args.scale is not None:
            found = scale.plans(settings, on, args.scale)
            print(scale.table(found))
            image = args.output or Path(f"scaling_{settings.name}.svg")
            scale.draw(found, image)
            print(f"{image}: written", file=sys.stderr)
            return 0
        plan = Plan.of(settings, on, args.restart_minutes)
        used = energy.planned(plan.gpu_hours, on.gpu.watts, args.utilisation, energy.Site(args.pue, args.grid))
        print(text(plan, f"{used}: GPUs at {args.utilisation:.0%} of {on.gpu.watts:.0f} W"))
        for warning in plan.warnings():
            print(f"warning: {warning}", file=sys.stderr)
    except (RecipeError, ValueError) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    if args.save:
        site = {"kwh": used.kwh, "tokens": plan.steps * plan.tokens_per_step, "pue": args.pue, "grid": args.grid}
        write_json(settings.run_folder / PLAN_NAME, {**plan.summary(), **site})
    if plan.needed > plan.gpu.memory:
        worst = max(plan.places, key=lambda place: memory(place).total)
        print(
            f"refused: stage {worst.stage} needs {plan.needed / GIB:.1f} GiB, a {on.name} has "
            f"{plan.gpu.memory / GIB:.1f}; lower batch.micro_batch_size, recompute more, or split the model further",
            file=sys.stderr,
        )
        return 2
    return 0
