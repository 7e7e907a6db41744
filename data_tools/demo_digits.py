"""The vision demo's images and conversations: scikit-learn's scanned digits. `python -m data_tools.demo_digits --help`.

1,797 digits written by hand, 8 x 8 pixels of 17 shades, which come with the package; a user asks for each which digit
it shows, in one of several ways, and the assistant answers with its name.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from data_tools.command_line import guarded
from data_tools.files.durable import write_beside
from data_tools.files.errors import DataError

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTIONS = ("Which digit is this?", "What number do you see?", "Read the digit.", "Which number was written here?")


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m data_tools.demo_digits --output demo/digits",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    output = parser.parse_args().output
    return guarded(lambda: _write(output))


def _write(output: Path) -> int:
    try:
        from PIL import Image
        from sklearn.datasets import load_digits
    except ImportError as error:
        remedy = "pip install -c constraints.txt -e '.[vision]'"
        raise DataError(f"{error.name} is not installed", file=output, remedy=remedy) from None
    digits = load_digits()
    (output / "images").mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        name = f"digit_{number:04d}.png"
        Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(output / "images" / name)
        turns = [
            {"from": "human", "value": f"<image>\n{QUESTIONS[number % len(QUESTIONS)]}"},
            {"from": "gpt", "value": f"{NAMES[digit]}"},
        ]
        entries.append({"id": f"{number}", "image": name, "conversations": turns})
    with write_beside(output / "digits.json") as stream:
        stream.write(json.dumps(entries, indent=1).encode())
    print(f"{output}: {len(entries):,} digits, a question and its answer about each")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
