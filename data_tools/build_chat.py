"""Conversations to packed rows to train a chat model on: `python data_tools/build_chat.py COMMAND --help`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder of this file must not come first on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_tools.command_line import count, guarded
from data_tools.dataset.format import MAX_VOCAB_SIZE, ROW_LENGTH, SEED, DatasetManifest
from data_tools.files.errors import ErrorPolicy

DEFAULT_TEMPLATE = Path(__file__).parent / "chat" / "mobillama.jinja"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="build_chat.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build",
        help="render, mark and pack conversations",
        description="Render conversations by a chat template, mark what the assistant says, pack them into rows.",
        epilog="example:\n  python data_tools/build_chat.py build --input conversations --output chat"
        " --tokenizer tokenizer.model --held-out-rows 64",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("--input", type=Path, required=True, metavar="PATH", help="a JSONL or Parquet file, or a folder")
    build.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    build.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="tokenizer.model or .json")
    build.add_argument(
        "--template", type=Path, default=DEFAULT_TEMPLATE, metavar="FILE", help=f"Jinja ({DEFAULT_TEMPLATE.name})"
    )
    build.add_argument("--row-length", type=count(2), default=ROW_LENGTH, metavar="N", help=f"ids a row ({ROW_LENGTH})")
    build.add_argument(
        "--vocab-size", type=count(1, MAX_VOCAB_SIZE), metavar="N", help="the model's: ids are below it (tokenizer's)"
    )
    build.add_argument(
        "--overlong", choices=("truncate", "drop"), default="truncate", help="a conversation beyond a row (truncate)"
    )
    build.add_argument("--held-out-rows", type=count(0), default=0, metavar="N", help="rows kept from training (0)")
    build.add_argument("--seed", type=count(0, 2**32 - 1), default=SEED, metavar="N", help=f"chooses them ({SEED})")
    build.add_argument("--workers", type=count(1), default=len(os.sched_getaffinity(0)), metavar="N", help="processes")
    build.add_argument(
        "--on-error", choices=("stop", "quarantine"), default="stop", help="at a bad conversation (stop)"
    )
    build.add_argument(
        "--max-rejected", type=count(0), default=100, metavar="N", help="stop when more of a file are bad (100)"
    )
    verify = commands.add_parser("verify", help="recompute a data set's digests, ids, marks and counts")
    verify.add_argument("--input", type=Path, required=True, metavar="FOLDER")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Runs one command; returns the exit code."""
    # Imported here: --help needs no library.
    if arguments.command == "verify":
        from data_tools.index.verify import report

        return report(arguments.input)
    from data_tools.chat.build import build
    from data_tools.chat.rows import ChatOptions

    options = ChatOptions(arguments.row_length, arguments.overlong, arguments.held_out_rows, arguments.seed)
    manifest = build(
        arguments.input,
        arguments.output,
        arguments.tokenizer,
        arguments.template,
        options,
        vocab_size=arguments.vocab_size,
        policy=ErrorPolicy(arguments.on_error == "quarantine", arguments.max_rejected),
        workers=arguments.workers,
    )
    _say(arguments.output, manifest)
    return 0


def _say(folder: Path, manifest: DatasetManifest) -> None:
    chat, held_out = manifest.chat, manifest.held_out
    assert chat is not None
    print(
        f"{folder}: {chat.conversations:,} conversations in {manifest.rows:,} rows of {manifest.row_length} ids,"
        f" {chat.counted / (manifest.rows * manifest.row_length):.1%} of them the assistant's;"
        f" {chat.held_out_conversations:,} held out in {held_out.rows if held_out else 0:,} rows;"
        f" {chat.truncated:,} truncated, {chat.dropped:,} dropped, {manifest.rejected:,} rejected."
        f" Turns end with {chat.end_of_turn}"
    )


def main() -> int:
    """Entry point."""
    return guarded(lambda: run(build_parser().parse_args()))


if __name__ == "__main__":
    sys.exit(main())
