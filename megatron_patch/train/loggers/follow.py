"""Feed a service from RUN/log.jsonl: `python -m megatron_patch.train.loggers.follow NAME RUN ...`, by rank 0.

Ends when its standard input does, or its parent has gone, and all is sent: at the latest `--finish` seconds later, by
exit 3. A service that cannot be reached is tried again every minute until then, from the first record that it lacks.
"""

from __future__ import annotations

import argparse
import importlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_patch import recipe
from megatron_patch.run.log import DAMAGED, record_of
from megatron_patch.train.loggers.logger import RunOfService, Service
from megatron_patch.train.loggers.service import FOLDER_NAME

SECONDS_BETWEEN_READS = 1.0
SECONDS_BETWEEN_TRIES = 60.0


class Attempt:
    """Whether the training that is followed still goes on; once it does not, this process ends in a bounded time."""

    def __init__(self, seconds_to_finish: float) -> None:
        self._parent, self._seconds_to_finish = os.getppid(), seconds_to_finish
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()  # whatever a library waits for meanwhile

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    def wait(self, seconds: float) -> None:
        """Return after `seconds`, or when the attempt is over."""
        self._over.wait(seconds)

    def _watch(self) -> None:
        # A forked child of the training may hold the pipe open after the training itself was killed.
        while os.getppid() == self._parent and not select.select([sys.stdin], [], [], SECONDS_BETWEEN_READS)[0]:
            pass
        self._over.set()
        time.sleep(self._seconds_to_finish)
        os._exit(3)


def main(argv: list[str]) -> int:
    """Exit code 0: the service has every record of the attempt; 3: it has not."""
    parser = argparse.ArgumentParser(prog="python -m megatron_patch.train.loggers.follow", description=__doc__)
    parser.add_argument("service")
    parser.add_argument("run", type=Path)
    parser.add_argument("--log", type=int, required=True, help="file descriptor of the attempt's log.jsonl")
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--done", type=int, required=True, help="the step that the attempt goes on from")
    parser.add_argument("--finish", type=float, required=True, help="seconds that are left once the attempt is over")
    args = parser.parse_args(argv)
    # What stops a training stops its ranks, which save first and then end this process.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    folder = args.run / FOLDER_NAME
    people = os.fdopen(os.dup(2), "w", buffering=1)
    with (folder / f"{args.service}.log").open("ab", buffering=0) as chatter:
        os.dup2(chatter.fileno(), 1)
        os.dup2(chatter.fileno(), 2)
    settings = recipe.load(args.run / "recipe.yaml")
    run = RunOfService(
        id=args.run_id,
        name=settings.run_folder.name,
        done=args.done,
        config=settings.model_dump(mode="json"),
        folder=folder,
    )
    os.chdir(folder)  # where a library leaves what it was given no place for
    with os.fdopen(args.log, "rb") as log:
        return follow(log, args.service, run, Attempt(args.finish), people)


def follow(log: IO[bytes], name: str, run: RunOfService, attempt: Attempt, people: IO[str]) -> int:
    """Send records until the attempt is over and all are sent. Whatever the library raises is an outage."""
    was_away = False
    while True:
        try:
            service = open_service(name, run)
            try:
                for record in new_records(log, attempt, service.step):
                    service.write(record)
                    if was_away:
                        people.write(f"run.loggers: {name} is there again\n")
                        was_away = False
            finally:
                service.close()
            return 0
        except Exception as error:
            if not was_away:
                words = str(error).strip().partition("\n")[0] or type(error).__name__
                people.write(f"run.loggers: {name} cannot be reached ({words}); trying again every minute\n")
            print(f"{time.strftime('%F %T')} {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            was_away = True
        if attempt.is_over:
            return 3
        attempt.wait(SECONDS_BETWEEN_TRIES)


def open_service(name: str, run: RunOfService) -> Service:
    """The class `Run` of `to_NAME.py`."""
    service: Service = importlib.import_module(f"megatron_patch.train.loggers.to_{name}").Run(run)
    return service


def new_records(log: IO[bytes], attempt: Attempt, after: int) -> Iterator[dict[str, Any]]:
    """Records of later steps than `after` as they are written, until the attempt is over and the log is read."""
    log.seek(0)
    begun = b""
    while True:
        over = attempt.is_over
        begun += log.readline()
        if begun.endswith(b"\n"):
            line, begun = begun, b""
            try:
                record = record_of(line)
            except DAMAGED as error:
                print(f"log.jsonl: a damaged line is left out ({error})", file=sys.stderr)
                continue
            if record["step"] > after:
                yield record
        elif over:
            return
        else:
            attempt.wait(SECONDS_BETWEEN_READS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
