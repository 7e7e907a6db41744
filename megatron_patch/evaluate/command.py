"""`python -m megatron_patch eval`: score models, fetch the data sets, print the paper's tables, plot a sweep.

eval RUN --data benchmarks_data                           every milestone of a run that has no scores yet
eval CHECKPOINT | HF_FOLDER | ORG/NAME --data ...         one model; under torchrun the ranks share the work
eval --download benchmarks_data                           where there is a network
eval --table evaluations [--format csv]                   Tables 4, 5 and 9, the paper's figures beside ours
eval --plot evaluations scores.png                        scores against tokens
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_patch.evaluate.suite import BENCHMARKS, BY_NAME


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL", help="run, checkpoint, Hugging Face folder or hub name")
    parser.add_argument("--data", type=Path, default=Path("benchmarks_data"), help="folder filled by --download")
    parser.add_argument("--output", type=Path, default=Path("evaluations"), help="folder of results")
    parser.add_argument("--benchmarks", default=",".join(BY_NAME), help="names from: " + ", ".join(BY_NAME))
    parser.add_argument("--limit", type=int, help="documents a task, for a trial")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: as stored")
    parser.add_argument("--batch-size", type=int, help="rows a batch; default: as many as fit")
    parser.add_argument(
        "--empty-context",
        choices=("eos", "bos"),
        default="eos",
        help="what stands before a text without context (CrowS-Pairs); training saw no BOS",
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file in place of the model's own")
    parser.add_argument(
        "--recipe", type=Path, help="read Hugging Face folders into our model under this recipe (the authors' need it)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run modelling code of Hugging Face folders")
    parser.add_argument("--download", type=Path, metavar="FOLDER", help="fetch every data set, with checksums")
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="print Tables 4, 5 and 9")
    parser.add_argument("--format", choices=("markdown", "csv"), default="markdown", help="of --table")
    parser.add_argument("--all", action="store_true", help="of --table: every checkpoint, not each run's last")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("RESULTS", "PNG"), help="scores against tokens")


def main(args: argparse.Namespace) -> int:
    """Exit code 2: refused, with the remedy."""
    try:
        return _main(args)
    except ValueError as error:  # every refusal of ours is one: missing data, damaged weights, unknown names
        if os.environ.get("RANK", "0") == "0":
            print(f"refused: {error}", file=sys.stderr)
        return 2


def _main(args: argparse.Namespace) -> int:
    if args.download:
        from megatron_patch.evaluate.data import all_hub_data, download

        download(args.download, all_hub_data())
        return 0
    if args.table:
        from megatron_patch.evaluate.results import read_scores
        from megatron_patch.evaluate.tables import newest, render

        found = read_scores(args.table)
        print(render(found if args.all else newest(found), args.format))
        return 0
    if args.plot:
        from megatron_patch.evaluate.plot import plot
        from megatron_patch.evaluate.results import read_scores

        results, png = args.plot
        plot(read_scores(results), png)
        return 0
    return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    unknown = [name for name in args.benchmarks.split(",") if name not in BY_NAME]
    if unknown or not args.models:
        raise ValueError(
            f"--benchmarks: unknown {', '.join(unknown)}; known: {', '.join(BY_NAME)}"
            if unknown
            else "no model named; give a run, a checkpoint, a Hugging Face folder or a hub name"
        )
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # data sets come from --data alone
    from megatron_patch.evaluate.models import Settings, find
    from megatron_patch.evaluate.results import read_scores
    from megatron_patch.evaluate.run import Plan, run
    from megatron_patch.evaluate.tables import render

    wanted = args.benchmarks.split(",")
    settings = Settings(
        precision=args.precision,
        batch_size=args.batch_size,
        empty_context=args.empty_context,
        tokenizer=args.tokenizer,
        trust_remote_code=args.trust_remote_code,
        recipe=args.recipe,
    )
    plan = Plan(tuple(b for b in BENCHMARKS if b.name in wanted), args.data, args.limit)
    folders = [run(candidate, settings, plan, args.output) for model in args.models for candidate in find(model)]
    if os.environ.get("RANK", "0") == "0":
        print(render([s for s in read_scores(args.output) if s["folder"] in {f.name for f in folders}], "markdown"))
    return 0
