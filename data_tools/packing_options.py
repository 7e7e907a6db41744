"""What the commands that pack conversations share: their options, and what they say at the end. Needs no library."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from data_tools.command_line import count
from data_tools.dataset.format import MAX_VOCAB_SIZE, ROW_LENGTH, SEED, DatasetManifest
from data_tools.files.errors import ErrorPolicy

DEFAULT_TEMPLATE = Path(__file__).parent / "chat" / "mobillama.jinja"


def add_packing(build: argparse.ArgumentParser, bad: str, unit: str) -> None:
    """The options of `build` but for its input; `bad` may be set aside, `unit` is what --max-rejected counts in."""
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
    build.add_argument("--on-error", choices=("stop", "quarantine"), default="stop", help=f"at a bad {bad} (stop)")
    build.add_argument(
        "--max-rejected", type=count(0), default=100, metavar="N", help=f"stop when more of {unit} are bad (100)"
    )


def policy_of(arguments: argparse.Namespace) -> ErrorPolicy:
    """What --on-error and --max-rejected say."""
    return ErrorPolicy(arguments.on_error == "quarantine", arguments.max_rejected)


def packed(manifest: DatasetManifest) -> str:
    """A line about the conversations of a finished data set."""
    chat, held_out = manifest.chat, manifest.held_out
    assert chat is not None
    return (
        f"{chat.conversations:,} conversations in {manifest.rows:,} rows of {manifest.row_length} ids,"
        f" {chat.counted / (manifest.rows * manifest.row_length):.1%} of them the assistant's;"
        f" {chat.held_out_conversations:,} held out in {held_out.rows if held_out else 0:,} rows;"
        f" {chat.truncated:,} truncated, {chat.dropped:,} dropped, {manifest.rejected:,} rejected"
    )
