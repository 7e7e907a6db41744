"""The command line: numbers that a verb can use, and what those verbs take whose own modules need seconds to import.

What cannot be used is refused with the usage, before any work.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

QUANTIZATIONS = {
    "gguf": ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
    "onnx": ("int8", "int4"),
    "executorch": ("8da4w",),
}
"""Forms for other runtimes than transformers, and what `export --quantize` may store their matrices as."""

DTYPES = ("bf16", "fp16", "fp32")
"""What `export --dtype` may store the weights of Hugging Face's forms as."""


def count(text: str) -> int:
    """A whole number of at least 1, in 64 bits."""
    if not 1 <= (number := int(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is given, a whole number of at least 1 is needed")
    return number


def counts(text: str) -> list[int]:
    """Whole numbers of at least 1, divided by commas: 1,2,4."""
    return [count(part) for part in text.split(",")]


def share(text: str) -> float:
    """A number of at least a millionth and at most 1."""
    if not 1e-6 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is given, a share of 0.000001 to 1 is needed, e.g. 0.45")
    return number


def amount(text: str) -> float:
    """A finite number of at least 0."""
    if not 0 <= (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is given, a number of at least 0 is needed")
    return number


def temperature(text: str) -> float:
    """0, or what logits can be divided by."""
    if (number := amount(text)) and not 1e-4 <= number <= 1e4:
        raise argparse.ArgumentTypeError(f"{text} is given, 0 or a number of 0.0001 to 10,000 is needed")
    return number


def seed(text: str) -> int:
    """A whole number that a generator of draws takes."""
    if not 0 <= (number := int(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is given, a whole number of at least 0 in 64 bits is needed")
    return number


def file(text: str) -> Path:
    """Where a file is to be written: no folder stands there, and the folder it goes into is there."""
    if (path := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, the name of a file is needed")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: a folder is needed to write it in, and {path.parent} is none")
    return path


def folder(text: str) -> Path:
    """A folder, which may be yet to come: nothing else stands there."""
    if (path := Path(text)).exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a file, a folder is needed")
    return path


def train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="a file or name of recipes/")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="e.g. batch.micro_batch_size=4"
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume although the recipe or the data set is not the checkpoint's; recorded in the checkpoints after",
    )


def check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="a file or name of recipes/: its run folder's disk is measured")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument(
        "--folder", type=Path, help="new shared folder for answers and verdict; default: one in RUN/check"
    )
    parser.add_argument("--slow", type=share, default=0.8, help="a GPU below this share of the median pace is bad")
    parser.add_argument("--slow-network", type=share, default=0.6, help="the same for all-reduce between two nodes")
    parser.add_argument("--slow-disk", type=share, default=0.2, help="the same for the checkpoint path")
    parser.add_argument("--patience", type=amount, default=120, help="seconds that one measurement may take")


def summary(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--prompt", default="The function returns", help="text that the sample continues")
    parser.add_argument("--tokens", type=count, default=60, help="tokens to sample, or that an answer may take (60)")


def chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder, or a checkpoint")
    parser.add_argument(
        "--data", type=Path, help="what build_chat.py wrote, where the recipe's data.folder is not here"
    )
    parser.add_argument("--image", type=Path, help="what the questions are about, for a model that sees")
    parser.add_argument("--system", help="a system message before the first question")
    parser.add_argument("--tokens", type=count, default=400, help="that an answer may take (400)")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--seed", type=seed, default=0, help="of the draws at a temperature above 0")


def export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint")
    parser.add_argument("output", type=Path, help="new folder; of --form gguf and executorch a new file")
    parser.add_argument("--form", choices=("expanded", "shared", *QUANTIZATIONS), required=True)
    parser.add_argument(
        "--quantize",
        choices=sorted({kind for kinds in QUANTIZATIONS.values() for kind in kinds}),
        help="; ".join(f"{form}: {', '.join(kinds)}" for form, kinds in QUANTIZATIONS.items()),
    )
    parser.add_argument(
        "--context", type=count, help="of --form executorch: ids that its KV cache holds; default: those of a row"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of Hugging Face's forms; default: the checkpoint's own")
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.model or tokenizer.json, where the checkpoint has none"
    )
    parser.add_argument(
        "--evaluations", type=folder, default=Path("evaluations"), help="results of `eval`, for the model card"
    )


def import_(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, help="Hugging Face folder: ours in either form, or the authors'; or a GGUF file"
    )
    parser.add_argument("checkpoint", type=Path, help="new checkpoint folder")
    parser.add_argument("--recipe", type=Path, help="the model's recipe, where it carries none")
