"""What the data tools' commands share: numbers that can be used, and errors reported without a traceback."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable

from data_tools.files.empty_words import empty_word
from data_tools.files.errors import DataError


def count(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """A whole number from `lowest` on, up to `highest`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = lowest - 1
        if number < lowest or (highest is not None and number > highest):
            bound = f"from {lowest} to {highest}" if highest is not None else f"of at least {lowest}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bound}")
        return number

    return read


def arguments_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says; a word that is empty ends the process, as what the parser refuses does."""
    if nothing := empty_word(sys.argv[1:]):
        parser.error(nothing)
    return parser.parse_args()


def guarded(run: Callable[[], int]) -> int:
    """The exit code of `run`; errors in the data and of the file system are printed in one or two lines."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # Slurm's time limit, a closed terminal: as Ctrl-C, unless ignored
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)
    try:
        return run()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.filename is None:  # not about a file: a fault of ours, whose place is wanted
            raise
        print(
            f"error: {error.filename}: {error.strerror}\n  remedy: check the path, its permissions and its file system,"
            " then run the same command again: finished work is kept",
            file=sys.stderr,
        )
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        print("interrupted: the same command goes on, finished work is kept", file=sys.stderr)
        return 128 + int(number)
    return 1


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(number)
