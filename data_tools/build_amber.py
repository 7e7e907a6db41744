"""Amber from raw text to 360 indexed segments: `python data_tools/build_amber.py COMMAND --help`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a file: the folder of this file must not come first on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_tools.command_line import arguments_of, count, guarded
from data_tools.dataset.format import MAX_VOCAB_SIZE, NUM_SEGMENTS, ROW_LENGTH, SEED, DatasetManifest
from data_tools.files.errors import DataError, ErrorPolicy

if TYPE_CHECKING:
    from data_tools.build_config import BuildConfig

AMBER = Path(__file__).with_name("amber.yaml")


def _segments(text: str) -> range:
    """`7` or `0-35`."""
    first, _, last = text.partition("-")
    try:
        chosen = range(int(first), int(last or first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a segment (7) nor a range of them (0-35)") from None
    if not chosen or chosen.start < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is an empty range")
    return chosen


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    help_text: str,
    example: str,
    needs_input: bool = True,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=f"example:\n  python data_tools/build_amber.py {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if needs_input:
        parser.add_argument("--input", type=Path, required=True, metavar="FOLDER")
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")


def _add_errors(parser: argparse.ArgumentParser, what: str, whole: str) -> None:
    parser.add_argument("--on-error", choices=("stop", "quarantine"), default="stop", help=f"at a bad {what} (stop)")
    parser.add_argument(
        "--max-rejected",
        type=count(0),
        default=100,
        metavar="N",
        help=f"stop when more {what}s of a {whole} are bad (100)",
    )


def _add_sources(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--config", type=Path, metavar="YAML", help=f"{what} its `sources` list (amber.yaml)")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--row-length", type=count(1), metavar="N", help="ids a row (2049, or what mix.json says)")
    parser.add_argument(
        "--vocab-size", type=count(1, MAX_VOCAB_SIZE), metavar="N", help="ids are below it (the tokenizer's, or 32000)"
    )
    parser.add_argument(
        "--num-segments", type=count(1), metavar="N", help="how many there must be (as many as --input seems to have)"
    )


def _add_segment(parser: argparse.ArgumentParser, then: str) -> None:
    parser.add_argument(
        "--segment", type=_segments, metavar="K|A-B", help=f"only these segments (Slurm array); then {then}"
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="build_amber.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    tokenize = _command(
        commands,
        "tokenize",
        "turn raw text (one folder a source) into rows of token ids",
        "--input raw --output rows --tokenizer tokenizer.model --workers 16",
    )
    _add_output(tokenize)
    tokenize.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="tokenizer.model or .json")
    tokenize.add_argument("--source", metavar="NAME", help="--input holds this source alone")
    _add_sources(tokenize, "every source of it, where")
    tokenize.add_argument("--row-length", type=count(1), default=ROW_LENGTH, metavar="N", help="ids a row (2049)")
    tokenize.add_argument(
        "--workers", type=count(1), default=len(os.sched_getaffinity(0)), metavar="N", help="processes"
    )
    _add_errors(tokenize, "document", "source")

    mix = _command(
        commands,
        "mix",
        "distribute the rows of all sources over segments of equal size",
        "--input rows --output segments --num-segments 360 --direct",
    )
    _add_output(mix)
    mix.add_argument("--num-segments", type=count(1), default=NUM_SEGMENTS, metavar="N", help="(360)")
    mix.add_argument("--direct", action="store_true", help="write indexed binaries at once, no JSONL")
    held_out = mix.add_mutually_exclusive_group()
    held_out.add_argument(
        "--held-out-per-source", type=count(0), default=0, metavar="N", help="rows kept from training (0)"
    )
    held_out.add_argument(
        "--held-out", type=Path, metavar="FOLDER", help="tokenised documents held out whole: all their rows"
    )
    mix.add_argument("--seed", type=count(0), default=SEED, metavar="N", help=f"chooses the held-out rows ({SEED})")
    _add_sources(mix, "the order of the sources is that of")
    _add_segment(mix, "once without it")

    index = _command(
        commands,
        "index",
        "turn train_000.jsonl ... into indexed binaries, every row checked",
        "--input amber --output indexed --segment $SLURM_ARRAY_TASK_ID",
    )
    _add_output(index)
    _add_plan(index)
    _add_sources(index, "without mix.json, the sources are")
    index.add_argument(
        "--threads", type=count(1), default=len(os.sched_getaffinity(0)), metavar="N", help="parsing threads"
    )
    _add_errors(index, "row", "segment")
    _add_segment(index, "merge")

    merge = _command(
        commands,
        "merge",
        "write the manifest of a data set whose segments were built one by one, or name the missing ones",
        "--input amber --output indexed --num-segments 360",
    )
    _add_output(merge)
    _add_plan(merge)
    _add_sources(merge, "without mix.json, the sources are")

    verify = _command(commands, "verify", "recompute a data set's digests, ids and counts", "--input indexed")
    verify.add_argument("--segment", type=_segments, metavar="K|A-B", help="only these segments")
    verify.add_argument(
        "--against", type=Path, metavar="FOLDER", help="their JSONL: name the row and byte where a digest differs"
    )
    _add_fetch_and_run(commands)
    _command(commands, "stats", "show a data set's totals per source against the paper's Table 2", "--input indexed")
    return parser


def _add_fetch_and_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    fetch = _command(
        commands,
        "fetch",
        "bring the published segments and their tokenizer, from a machine with internet",
        "--output amber --segment 0-359",
        needs_input=False,
    )
    _add_output(fetch)
    fetch.add_argument("--config", type=Path, default=AMBER, metavar="YAML", help="names the address (amber.yaml)")
    fetch.add_argument("--input", metavar="ADDRESS", help="another address; segment k is ADDRESS/train_{k:03d}.jsonl")
    fetch.add_argument("--tokenizer", metavar="ADDRESS", help="another address of tokenizer.json or tokenizer.model")
    fetch.add_argument("--checksums", type=Path, metavar="FILE", help="SHA-256 of every file (sha256sum)")
    fetch.add_argument("--allow-unlisted", action="store_true", help="take files that --checksums does not list")
    fetch.add_argument("--segment", type=_segments, metavar="K|A-B", help="only these segments (all 360)")

    run_parser = _command(
        commands,
        "run",
        "do everything, raw text to verified binaries, as one YAML file says",
        "--config data_tools/amber.yaml --input raw --output amber",
    )
    _add_output(run_parser)
    run_parser.add_argument("--config", type=Path, default=AMBER, metavar="YAML", help="the build (amber.yaml)")
    run_parser.add_argument(
        "--workers", type=count(1), default=len(os.sched_getaffinity(0)), metavar="N", help="processes"
    )
    _add_errors(run_parser, "document or row", "source or segment")


def run(arguments: argparse.Namespace) -> int:
    """Runs one command; returns the exit code."""
    # Imported here, a command at a time: the tokenizers' libraries take longer to load than index takes to start.
    if arguments.command == "tokenize":
        return _tokenize(arguments)
    if arguments.command == "mix":
        from data_tools.pack.mix import MixOptions, mix

        options = MixOptions(arguments.num_segments, arguments.direct, arguments.held_out_per_source, arguments.seed)
        config = _config(arguments)
        if arguments.config and (missing := [n for n in config.sources if not (arguments.input / n).is_dir()]):
            raise DataError(
                f"{arguments.config} lists {', '.join(missing)}, which has no rows here",
                file=arguments.input,
                remedy="run tokenize for it first",
            )
        names = config.source_names
        result = mix(arguments.input, arguments.output, options, arguments.segment, names, arguments.held_out)
        if isinstance(result, DatasetManifest):
            _say_dataset(arguments.output, result)
        elif result is not None:
            print(f"{arguments.output}: {result['num_segments']} JSONL segments, {result['dropped_rows']} rows dropped")
        return 0
    if arguments.command in ("index", "merge"):
        return _index(arguments)
    if arguments.command in ("fetch", "run"):
        return _fetch_or_run(arguments)
    from data_tools.index.verify import report, stats_table

    if arguments.command == "stats":
        print(stats_table(arguments.input))
        return 0
    return report(arguments.input, arguments.segment, arguments.against)


def _config(arguments: argparse.Namespace) -> BuildConfig:
    """The build that --config names, Amber's where it names none."""
    from data_tools.build_config import read_config

    return read_config(arguments.config or AMBER)


def _policy(arguments: argparse.Namespace) -> ErrorPolicy:
    return ErrorPolicy(arguments.on_error == "quarantine", arguments.max_rejected)


def _source_folders(arguments: argparse.Namespace) -> dict[str, Path]:
    """By source, the folder of its raw text: --input itself, INPUT/NAME, or where --config says."""
    listed = _config(arguments).sources
    if arguments.source:
        if arguments.source not in listed:
            raise DataError(
                f"lists no source {arguments.source!r}, but {', '.join(listed)}",
                file=arguments.config or AMBER,
                place="sources",
                remedy="add it there, or to a copy that --config names",
            )
        return {arguments.source: arguments.input}
    if arguments.config:
        for name, place in listed.items():
            if not (arguments.input / place).is_dir():
                raise DataError(
                    "no such folder", file=arguments.input / place, place=name, remedy=f"set it in {arguments.config}"
                )
        return {name: arguments.input / place for name, place in listed.items()}
    folders = {name: arguments.input / name for name in listed if (arguments.input / name).is_dir()}
    if not folders:
        raise DataError(
            "no folder named after a source",
            file=arguments.input,
            remedy=f"name them {', '.join(listed)}, or use --source, or list yours in a YAML file (--config)",
        )
    from data_tools.sources.source_files import READ_SUFFIXES

    beside = [path for path in arguments.input.iterdir() if path.name not in listed and not path.name.startswith(".")]
    if others := sorted(path.name for path in beside if path.is_dir()):
        print(f"{arguments.input}: not named after a source and left out: {', '.join(others)}", file=sys.stderr)
    if loose := sorted(path.name for path in beside if path.name.endswith(READ_SUFFIXES)):
        print(f"{arguments.input}: in no source's folder and left out: {', '.join(loose)}", file=sys.stderr)
    return folders


def _tokenize(arguments: argparse.Namespace) -> int:
    from data_tools.pack.tokenize_source import tokenize_source
    from data_tools.sources.source_files import list_copies, refuse_shared

    folders = _source_folders(arguments)
    refuse_shared(folders)
    for copy in list_copies(folders):
        print(copy, file=sys.stderr)
    for name, folder in folders.items():
        manifest = tokenize_source(
            name,
            folder,
            arguments.output,
            arguments.tokenizer,
            row_length=arguments.row_length,
            workers=arguments.workers,
            policy=_policy(arguments),
        )
        print(
            f"{name}: {manifest['documents']:,} documents, {manifest['rows']:,} rows,"
            f" {manifest['tail_tokens']:,} ids left over, {manifest['rejected']:,} rejected"
        )
    return 0


def _index(arguments: argparse.Namespace) -> int:
    from data_tools.index.index_segments import index, merge, plan_dataset
    from data_tools.index.jsonl_segments import MIX_MANIFEST

    segments = arguments.segment if arguments.command == "index" else None
    of_mix = arguments.config is None and (arguments.input / MIX_MANIFEST).is_file()  # says its sources itself
    names = None if of_mix else _config(arguments).source_names
    plan = plan_dataset(
        arguments.input, arguments.row_length, arguments.vocab_size, segments, arguments.num_segments, names
    )
    if arguments.command == "merge":
        _say_dataset(arguments.output, merge(arguments.input, arguments.output, plan))
        return 0
    manifest = index(arguments.input, arguments.output, plan, _policy(arguments), segments, arguments.threads)
    if manifest is not None:
        _say_dataset(arguments.output, manifest)
    return 0


def _fetch_or_run(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    if arguments.command == "run":
        from data_tools.run_all import run_all

        manifest = run_all(
            config,
            arguments.input,
            arguments.output,
            workers=arguments.workers,
            policy=_policy(arguments),
        )
        _say_dataset(arguments.output / "indexed", manifest)
        return 0
    from data_tools.index.checksums import read_checksums
    from data_tools.index.fetch import fetch_segments

    published = config.published
    address = arguments.input or (published and published.address)
    if not address:
        raise DataError("no address", file=arguments.config, place="published", remedy="give one with --input")
    tokenizer = arguments.tokenizer or (published.tokenizer if published and not arguments.input else None)
    checksums = read_checksums(arguments.checksums) if arguments.checksums else {}
    unvouched = fetch_segments(
        *(address, tokenizer, arguments.output, config.num_segments, arguments.segment, checksums),
        arguments.allow_unlisted,
    )
    if unvouched:
        names = ", ".join(unvouched[:5]) + (", ..." if unvouched[5:] else "")
        print(f"no checksum vouches for {len(unvouched)} of the files (--checksums): {names}")
    return 0


def _say_dataset(folder: Path, manifest: DatasetManifest) -> None:
    print(
        f"{folder}: {manifest.num_segments} segments of {manifest.rows_per_segment:,} rows,"
        f" {manifest.rows * manifest.row_length:,} tokens, {manifest.held_out.rows if manifest.held_out else 0:,} rows"
        f" held out, {manifest.dropped_rows:,} dropped, {manifest.rejected:,} rejected"
    )


def main() -> int:
    """Entry point."""
    return guarded(lambda: run(arguments_of(build_parser())))


if __name__ == "__main__":
    sys.exit(main())
