"""Does sharing the FFN pay? Small models of equal size against each other: `python -m benchmarks.ladder SIZE`.

Trains the arms of recipes/ladder/ by the protocol of docs/sharing.md at a size of benchmarks/ladder.yaml, and writes
what was found to OUT: ladder.md, ladder.csv and ladder.png. Runs that are finished are not done again. On a cluster,
start the same command with `--workers 1` in every task of an array; on a GPU, one worker a GPU.

    make ladder-data                                  the text, once
    python -m benchmarks.ladder small --workers 2     every run that is missing, then the report
    python -m benchmarks.ladder small --report        the report of what there is
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.ladder_queue import Ladder, LadderError, Protocol
from benchmarks.ladder_report import report
from benchmarks.measure import commit
from data_tools.files.errors import DataError
from data_tools.files.strict_yaml import read_yaml
from megatron_patch.parallel import device
from megatron_patch.recipe import RecipeError

SIZES = Path(__file__).with_suffix(".yaml")


def protocol_of(size: str) -> Protocol:
    return Protocol.model_validate(read_yaml(SIZES)[size])


def train_all(ladder: Ladder, workers: int) -> None:
    """Work the queue off with so many runs at a time. Raises LadderError where one fails; the others are stopped."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(ladder.work) for _ in range(workers)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # its worker then finds it unfinished, and ends too
            raise


def main() -> int:
    sizes = list(read_yaml(SIZES))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=sizes)
    parser.add_argument("--data", type=Path, default=Path("demo/ladder/data"), help="(demo/ladder/data)")
    parser.add_argument("--out", type=Path, help="(demo/ladder/SIZE)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time: idle cores, or GPUs (1)")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    out = args.out or Path("demo/ladder") / args.size
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    # A process that has used a GPU cannot be forked; without one, a fork of one that has imported torch saves seconds.
    start: Any = multiprocessing.get_context("spawn" if device.HAS_GPU else "forkserver")
    if not device.HAS_GPU:
        start.set_forkserver_preload(["megatron_patch.train.loop", "megatron_patch.__main__"])
    try:
        ladder = Ladder(protocol_of(args.size), args.data.absolute(), out, commit(), start)
        if not args.report:
            train_all(ladder, args.workers)
        print(report(ladder))
    except (LadderError, RecipeError, DataError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
