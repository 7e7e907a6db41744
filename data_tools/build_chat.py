"""Conversations to packed rows to train a chat model on: `python data_tools/build_chat.py COMMAND --help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder of this file must not come first on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_tools.command_line import arguments_of, guarded
from data_tools.packing_options import add_packing, packed, policy_of


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
    add_packing(build, "conversation", "a file")
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
        policy=policy_of(arguments),
        workers=arguments.workers,
    )
    assert manifest.chat is not None
    print(f"{arguments.output}: {packed(manifest)}. Turns end with {manifest.chat.end_of_turn}")
    return 0


def main() -> int:
    """Entry point."""
    return guarded(lambda: run(arguments_of(build_parser())))


if __name__ == "__main__":
    sys.exit(main())
