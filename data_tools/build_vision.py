"""Conversations about images to packed rows and image shards: `python data_tools/build_vision.py COMMAND --help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder of this file must not come first on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_tools.command_line import arguments_of, count, guarded
from data_tools.files.errors import DataError
from data_tools.packing_options import add_packing, packed, policy_of


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
    build.add_argument(
        "--image-tokens", type=count(1), required=True, metavar="N", help="what the encoder makes of an image"
    )
    build.add_argument("--placeholder", default="<s>", metavar="TOKEN", help="stands for a part of an image (<s>)")
    add_packing(build, "conversation or image", "5,000")
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
        policy=policy_of(arguments),
        workers=arguments.workers,
    )
    images = manifest.images
    assert images is not None
    print(
        f"{arguments.output}: {images.count:,} images of {images.tokens} tokens in {len(images.shards)} shards;"
        f" {packed(manifest)}"
    )
    return 0


def main() -> int:
    """Entry point."""
    return guarded(lambda: run(arguments_of(build_parser())))


if __name__ == "__main__":
    sys.exit(main())
