"""`python -m megatron_patch eval`: score models, fetch the data sets, print the paper's tables, plot a sweep.

eval --download benchmarks_data                           once, where there is a network
eval CHECKPOINT | HF_FOLDER | ORG/NAME                    one model; under torchrun the ranks share the work
eval RUN                                                  every milestone of a run that has no scores yet
eval RUN --watch                                          those and every later one as it appears, until the run is over
eval --table                                              Tables 4, 5, 8 and 9, ours beneath the paper's figures
eval --plot evaluations scores.png                        scores against tokens
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_patch.arguments import amount, count, folder
from megatron_patch.evaluate.suite import BENCHMARKS, BY_NAME, Benchmark
from megatron_patch.evaluate.tables import Format, newest, render
from megatron_patch.results import read_scores


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="run, checkpoint, folder of them, HF folder, hub name"
    )
    parser.add_argument("--data", type=Path, default=Path("benchmarks_data"), help="folder filled by --download")
    parser.add_argument("--output", type=Path, default=Path("evaluations"), help="folder of results")
    parser.add_argument(
        "--benchmarks",
        help=f"names from: {', '.join(BY_NAME)}; default: the last four of a model that sees, else the nine of text",
    )
    parser.add_argument("--watch", action="store_true", help="evaluate the milestones of a run as they appear")
    parser.add_argument("--every", type=amount, default=60, help="of --watch: seconds between two looks at the run")
    parser.add_argument(
        "--patience", type=amount, default=24, help="of --watch: hours of silence after which a run counts as given up"
    )
    parser.add_argument("--limit", type=count, help="documents a task, for a trial")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: as stored")
    parser.add_argument("--batch-size", type=count, help="rows a batch; default: as many as fit")
    parser.add_argument(
        "--empty-context",
        choices=("eos", "bos"),
        default="eos",
        help="what stands before a text without context (CrowS-Pairs); training saw no BOS",
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer file in place of the model's own")
    parser.add_argument(
        "--chat-template", type=Path, help="of a model that sees, where its data set is not there: chat_template.jinja"
    )
    parser.add_argument(
        "--recipe", type=Path, help="read Hugging Face folders into our model under this recipe (the authors' need it)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run modelling code of Hugging Face folders")
    parser.add_argument(
        "--download",
        type=Path,
        metavar="FOLDER",
        help="fetch the data sets of the nine benchmarks, or of --benchmarks, with checksums",
    )
    parser.add_argument(
        "--table",
        type=folder,
        metavar="RESULTS",
        nargs="?",
        const=Path("evaluations"),
        help="print Tables 4, 5, 8 and 9",
    )
    parser.add_argument("--format", choices=("markdown", "csv"), default="markdown", help="of --table")
    parser.add_argument("--all", action="store_true", help="of --table: every checkpoint, not each run's last")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("RESULTS", "IMAGE"), help="scores against tokens")


def main(args: argparse.Namespace) -> int:
    """Exit code 2: refused, with the remedy; 1: a damaged milestone was left out."""
    try:
        return _main(args)
    except ValueError as error:  # every refusal of ours is one: missing data, damaged weights, unknown names
        if os.environ.get("RANK", "0") == "0":
            print(f"refused: {error}", file=sys.stderr)
        return 2


def _main(args: argparse.Namespace) -> int:
    named = None if args.benchmarks is None else args.benchmarks.split(",")
    if unknown := [name for name in named or () if name not in BY_NAME]:
        raise ValueError(f"--benchmarks: unknown {', '.join(unknown)}; known: {', '.join(BY_NAME)}")
    benchmarks = None if named is None else tuple(b for b in BY_NAME.values() if b.name in named)
    if args.download:
        from megatron_patch.evaluate.data import all_hub_data, download

        download(args.download, all_hub_data(benchmarks or BENCHMARKS))
        return 0
    if args.table:
        print(_table(args.table, args.all, args.format))
        return 0
    if args.plot:
        from megatron_patch.evaluate.plot import plot

        plot(*args.plot)
        return 0
    if not args.models:
        raise ValueError("no model named; give a run, a checkpoint, a Hugging Face folder or a hub name")
    if args.tokenizer and not args.tokenizer.is_file():
        raise ValueError(f"--tokenizer {args.tokenizer}: no such file; name a tokenizer.model or tokenizer.json")
    if args.chat_template and not args.chat_template.is_file():
        raise ValueError(
            f"--chat-template {args.chat_template}: no such file; build_vision.py leaves one in a data set"
        )
    if args.watch and len(args.models) > 1:
        raise ValueError("--watch watches one run; start another command for another run")
    return _evaluate(args, benchmarks)


def _table(results: Path, every_checkpoint: bool, form: Format) -> str:
    found = read_scores(results)
    if not found:
        said = "no results in it" if results.is_dir() else "no such folder"
        print(f"{results}: {said} (--output of an evaluation): the paper's figures alone", file=sys.stderr)
    return render(found if every_checkpoint else newest(found), form)


def _evaluate(args: argparse.Namespace, benchmarks: tuple[Benchmark, ...] | None) -> int:
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # data sets come from --data alone
    from megatron_patch.evaluate.models import Settings, find, join_ranks
    from megatron_patch.evaluate.ranks import is_first_rank
    from megatron_patch.evaluate.run import Plan, run
    from megatron_patch.evaluate.watch import Patience, watch

    settings = Settings(
        precision=args.precision,
        batch_size=args.batch_size,
        empty_context=args.empty_context,
        tokenizer=args.tokenizer,
        trust_remote_code=args.trust_remote_code,
        recipe=args.recipe,
        chat_template=args.chat_template,
    )
    plan = Plan(benchmarks, args.data, args.limit)
    join_ranks()
    if args.watch:
        patience = Patience(args.every, 3600 * args.patience)
        folders, went_well = watch(Path(args.models[0]), settings, plan, args.output, patience)
    else:
        folders, went_well = [], True
        for candidate in (c for model in args.models for c in find(model)):
            if (folder := run(candidate, settings, plan, args.output)) is not None:
                folders.append(folder)
            elif is_first_rank():
                print(f"{candidate.name}: left to another process, which is evaluating it", file=sys.stderr)
    if is_first_rank():
        names = {folder.name for folder in folders}
        found = [s for s in read_scores(args.output) if s["folder"] in names]
        print(render(newest(found), "markdown"))
        if len(newest(found)) < len(found):
            print(f"The last checkpoint of each run; all: python -m megatron_patch eval --table {args.output} --all")
    return 0 if went_well else 1
