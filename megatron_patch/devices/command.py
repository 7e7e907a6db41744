"""`python -m megatron_patch device`: exported forms in their runtimes, against their checkpoint and each other.

    device CHECKPOINT FORM ... [--against CHECKPOINT FORM ...]

Each form runs in a process of its own: greedy tokens, log-probabilities of held-out rows, file, memory, speed. A form
that is worse than its checkpoint, or cannot be measured, ends it with exit code 1 once the others are done.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_tools.files.durable import write_whole
from megatron_patch.arguments import amount, count, file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="what the forms were exported from")
    parser.add_argument("forms", nargs="+", type=Path, metavar="FORM", help="GGUF and .pte files, and folders")
    parser.add_argument(
        "--against", nargs="+", action="append", default=[], type=Path, metavar="PATH",
        help="another checkpoint and its forms, for the same table",
    )  # fmt: skip
    parser.add_argument("--threads", nargs="+", type=count, default=[1, 2], help="(1 2)")
    parser.add_argument("--new-tokens", type=_two, default=64, help="greedy tokens after each of 8 prompts (64)")
    parser.add_argument("--data", type=Path, help="data set with held-out rows; default: the recipe's")
    parser.add_argument("--tokens", type=count, default=2000, help="held-out ids to score, at least (2000)")
    parser.add_argument("--random", action="store_true", help="random ids instead of held-out rows")
    parser.add_argument("--csv", type=file, help="write the table here too")
    parser.add_argument(
        "--most-loss", type=amount, default=0.1, help="nats a token that a form may lose before it is refused (0.1)"
    )


def _two(text: str) -> int:
    """A whole number of at least 2: decoding is timed after the first token."""
    if (number := count(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text} is given, a whole number of at least 2 is needed")
    return number


def main(args: argparse.Namespace) -> int:
    """Exit code 1: a form is worse than its checkpoint or was not measured; 2: refused, with the remedy."""
    from megatron_patch.parallel import topology

    try:
        return _measure(args)
    finally:
        topology.destroy()  # which the checkpoint's own model needed


def _measure(args: argparse.Namespace) -> int:
    from megatron_patch.devices.compare import Asked, measure_group
    from megatron_patch.devices.forms import find_form
    from megatron_patch.devices.machine import processor
    from megatron_patch.devices.runtimes import RuntimeFormError
    from megatron_patch.devices.table import as_csv, markdown

    try:
        groups = [(args.checkpoint, args.forms)]
        for checkpoint, *forms in args.against:
            if not forms:
                raise RuntimeFormError(f"--against {checkpoint}: name its forms behind it")
            groups.append((checkpoint, forms))
        rows, faults = [], []
        for checkpoint, forms in groups:
            asked = Asked(args.threads, args.new_tokens, args.tokens, args.data, args.random, args.most_loss)
            measured, told, wrong = measure_group(checkpoint, [find_form(form) for form in forms], asked)
            rows += measured
            faults += wrong
    except ValueError as error:  # RuntimeFormError, CheckpointError, DataError
        print(f"refused: {error}", file=sys.stderr)
        return 2
    if rows:
        print(markdown(rows, processor(), told))
    if args.csv:
        write_whole(args.csv, as_csv(rows).encode())
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0
