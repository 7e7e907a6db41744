"""`python -m megatron_patch report`: a run as one HTML file, or models side by side with the paper's.

report RUN                                writes RUN/report.html; works on a run in progress
report --compare RUN_OR_RECIPE ...        Table 1 with these models: parameters, tokens, GPU hours, memory, accuracy;
                                          with --devices FILE.csv what `device` measured, beside the paper's Table 6;
                                          with --output figure_1.png the same as bars
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_tools.files.durable import write_whole
from megatron_patch.arguments import file, folder
from megatron_patch.plan.hardware import add_hardware, hardware


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder; with --compare recipes too")
    parser.add_argument("--output", type=file, help="HTML file (RUN/report.html); of --compare: an image")
    parser.add_argument("--evaluations", type=folder, default=Path("evaluations"), help="results of `eval`")
    parser.add_argument("--compare", action="store_true", help="print Table 1 with these runs and recipes")
    parser.add_argument(
        "--devices", nargs="+", default=[], type=Path, metavar="CSV", help="of --compare: tables of `device --csv`"
    )
    add_hardware(parser.add_argument_group("planned models of --compare"))


def main(args: argparse.Namespace) -> int:
    """Exit code 2: refused, with the remedy."""
    try:
        if args.compare:
            from megatron_patch.report.compare import draw, markdown, rows
            from megatron_patch.report.on_device import device_markdown, device_rows

            planned_for = hardware(args)
            devices = device_rows(args.devices) if args.devices else []
            found = rows(args.runs, args.evaluations, planned_for)
            print(markdown(found, planned_for))
            if devices:
                print("\n" + device_markdown(devices))
            if args.output:
                draw(found, devices, args.output)
            return 0
        if args.devices:
            raise ValueError("--devices belongs to --compare; add it")
        if args.output and len(args.runs) > 1:
            raise ValueError("--output names one file; give one run, or leave it out")
        from megatron_patch.report.page import render
        from megatron_patch.report.read import read_run

        for run in args.runs:
            page = args.output or run / "report.html"
            write_whole(page, render(read_run(run, args.evaluations), page).encode())
            print(f"{page}: written", file=sys.stderr)
    except ValueError as error:  # ReportError, RecipeError, DataError
        print(f"refused: {error}", file=sys.stderr)
        return 2
    return 0
