"""Conversations about images to packed rows and image shards: `python data_tools/build_vision.py COMMAND --help`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder of this file must not come first on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_tools.build_chat import DEFAULT_TEMPLATE
from data_tools.command_line import count, guarded
from data_tools.dataset.format import MAX_VOCAB_SIZE, ROW_LENGTH, SEED, DatasetManifest
from data_tools.files.errors import DataError, ErrorPolicy


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="build_vision.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build",
        help="check images, render, mark and pack conversations",
        description="Check every image and put it into webdataset shards; render the conversations by a chat template,"
        " mark what the assistant says, and pack them into rows that point to their images.",
        epilog="example:\n  python data_tools/build_vision.py build --input llava_v1_5_mix665k.json --images images"
        " --output data/vision --tokenizer tokenizer.model --image-tokens 576 --held-out-rows 64",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    build.add_argument("--input", type=Path, required=True, metavar="FILE", help="LLaVA's JSON, or an object a line")
    build.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="below it lie the images")
    build.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    build.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="tokenizer.model or .json")
    build.add_argument(
        "--image-tokens", type=count(1), required=True, metavar="N", help="what the encoder makes of an image"
    )
    build.add_argument("--placeholder", default="<s>", metavar="TOKEN", help="stands for a part of an image (<s>)")
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
        "--on-error", choices=("stop", "quarantine"), default="stop", help="at a bad conversation or image (stop)"
    )
    build.add_argument(
        "--max-rejected", type=count(0), default=100, metavar="N", help="stop when more of 5,000 are bad (100)"
    )
    verify = commands.add_parser("verify", help="recompute a data set's digests, ids, marks, images and counts")
    verify.add_argument("--input", type=Path, required=True, metavar="FOLDER")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Runs one command; returns the exit code."""
    # Imported here: --help needs no library.
    if arguments.command == "verify":
        from data_tools.index.verify import report

        return report(arguments.input)
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise DataError(
            "Pillow is not installed, which reads images",
            file="PIL",
            remedy="pip install -c constraints.txt -e '.[vision]'",
        ) from None
    from data_tools.chat.rows import ChatOptions
    from data_tools.vision.build import build

    options = ChatOptions(arguments.row_length, arguments.overlong, arguments.held_out_rows, arguments.seed)
    manifest = build(
        arguments.input,
        arguments.images,
        arguments.output,
        arguments.tokenizer,
        arguments.template,
        options,
        placeholder=arguments.placeholder,
        tokens=arguments.image_tokens,
        vocab_size=arguments.vocab_size,
        policy=ErrorPolicy(arguments.on_error == "quarantine", arguments.max_rejected),
        workers=arguments.workers,
    )
    _say(arguments.output, manifest)
    return 0


def _say(folder: Path, manifest: DatasetManifest) -> None:
    chat, images, held_out = manifest.chat, manifest.images, manifest.held_out
    assert chat is not None and images is not None
    print(
        f"{folder}: {images.count:,} images of {images.tokens} tokens in {len(images.shards)} shards;"
        f" {chat.conversations:,} conversations in {manifest.rows:,} rows of {manifest.row_length} ids,"
        f" {chat.counted / (manifest.rows * manifest.row_length):.1%} of them the assistant's;"
        f" {chat.held_out_conversations:,} held out in {held_out.rows if held_out else 0:,} rows;"
        f" {chat.truncated:,} truncated, {chat.dropped:,} dropped, {manifest.rejected:,} rejected"
    )


def main() -> int:
    """Entry point."""
    return guarded(lambda: run(build_parser().parse_args()))


if __name__ == "__main__":
    sys.exit(main())
