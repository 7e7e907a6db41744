"""Rendezvous of ranks before they form a group: a signal ends the wait, and it names the ranks that are missing.

torch's own rendezvous waits in C++, where no signal handler runs, and names nobody.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import zip_longest

from torch.distributed import PrefixStore, Store, TCPStore

from megatron_patch.launch import LaunchError, WaitEnded, say

_LOOK = 0.2  # seconds between two looks at who is there
_FIRST_WORD, _NEXT_WORD = 10.0, 60.0  # seconds after which the wait is spoken of
_OUTCOME, _ALL_HERE = "outcome", "all ranks are here"


def meet(address: str, port: int, patience: timedelta, asked: Callable[[], str | None]) -> Store:
    """The store that every rank has reached; RANK and WORLD_SIZE say who this one is.

    `asked` is called while it waits; what it returns, a reason, ends the wait. Raises WaitEnded then, LaunchError where
    a rank has not come in time, torch's DistNetworkError where the address cannot be listened at or reached.

    The first one writes how it came out, for all: without that, a rank that comes after another's wait has ended would
    count it in, and form a group with nobody.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    watch = _Wait(patience.total_seconds(), asked)
    made = _Making(address, port, world_size, patience)
    while not made.done.wait(_LOOK):
        watch.look(lambda: f"rank 0 at {address}, port {port}", speaks=os.environ.get("LOCAL_RANK") == "0")
    store = made.store()
    if store.add("ranks here", 1) == world_size:
        store.compare_set(_OUTCOME, "", _ALL_HERE)
    store.set(_key(rank), platform.node())
    while not store.check([_OUTCOME]):
        try:
            watch.look(lambda: _missing(store, world_size), speaks=rank == 0)
        except WaitEnded as ended:
            if store.compare_set(_OUTCOME, "", f"rank {rank}: {ended}").decode() == _ALL_HERE:
                break  # what asked for the end is obeyed after the first step
            raise
        time.sleep(_LOOK)
    if (outcome := store.get(_OUTCOME).decode()) != _ALL_HERE:
        raise WaitEnded(outcome)
    return store


class _Making:
    """The store, made by a thread: connecting to it, too, waits in C++."""

    def __init__(self, address: str, port: int, world_size: int, patience: timedelta) -> None:
        self.done = threading.Event()
        self._store: Store | None = None
        self._error: Exception | None = None
        arguments = (address, port, world_size, patience)
        threading.Thread(target=self._make, args=arguments, name="meeting", daemon=True).start()

    def store(self) -> Store:
        """Raises what kept it from being made."""
        if self._store is None:
            raise self._error or LaunchError("the ranks' store was not made")
        return self._store

    def _make(self, address: str, port: int, world_size: int, patience: timedelta) -> None:
        is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        try:
            self._store = TCPStore(
                address,
                port,
                world_size,
                is_master=os.environ["RANK"] == "0" and not is_torchruns,
                timeout=patience,
                wait_for_workers=False,
                multi_tenant=not is_torchruns,
            )
            if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
                # torchrun --max-restarts keeps its store, with addresses of ranks that are gone. Its agents count
                # restarts each for itself, so that the number is common to all ranks on one node alone.
                restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
                self._store = PrefixStore(f"restart_{restart}", self._store)
        except Exception as error:
            self._error = error
        self.done.set()


class _Wait:
    """How long the wait has lasted, and what is printed about it."""

    def __init__(self, patience: float, asked: Callable[[], str | None]) -> None:
        self._asked = asked
        self._begun = time.monotonic()
        self._patience, self._next_word = patience, _FIRST_WORD

    def look(self, whom: Callable[[], str], speaks: bool) -> None:
        waited = time.monotonic() - self._begun
        if (reason := self._asked()) is not None:
            raise WaitEnded(f"{reason} while waiting for {whom()}; no step was done")
        if waited > self._patience:
            raise LaunchError(
                f"waited {waited:.0f} s for {whom()}; start every rank (torchrun or srun does), or unset RANK and "
                "WORLD_SIZE to run alone"
            )
        if speaks and waited > self._next_word:
            say(f"waiting for {whom()}", sys.stderr)
            self._next_word = waited + _NEXT_WORD


def _key(rank: int) -> str:
    return f"rank {rank} is on"


def _missing(store: Store, world_size: int) -> str:
    absent = [rank for rank in range(world_size) if not store.check([_key(rank)])]
    return f"{len(absent)} of {world_size} ranks: {', '.join(_ranges(absent)) or 'those that are on their way'}"


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    """1, 2, 3, 7 as `1-3`, `7`."""
    first: int | None = None
    for number, following in zip_longest(numbers, numbers[1:]):
        first = number if first is None else first
        if following != number + 1:
            yield f"{first}-{number}" if number > first else f"{number}"
            first = None
