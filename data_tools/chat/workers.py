"""Batches worked on in order, by processes where more than one is wanted."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property
from typing import Any, Generic, TypeVar

from data_tools.files.errors import DataError

_PR_SET_PDEATHSIG = 1
_made: Any = None  # of a worker process
_Made = TypeVar("_Made")
_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Workers(Generic[_Made]):
    """Calls functions with what `make(*arguments)` gives, which each process makes once; use as a context manager."""

    def __init__(self, count: int, make: Callable[..., _Made], *arguments: Any) -> None:
        """With a `count` of 1 this process does the work, and nothing is made before there is some."""
        self._count, self._make, self._arguments = count, make, arguments
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            context = multiprocessing.get_context("forkserver")
            self._pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(make, arguments))

    def __call__(self, function: Callable[[_Made, _In], _Out], batches: Iterable[_In]) -> Iterator[_Out]:
        """`function` of what was made and of each batch, in order.

        Raises:
            DataError: a worker process was killed.
        """
        if self._pool is None:
            yield from (function(self._alone, batch) for batch in batches)
            return
        waiting: deque[Future[_Out]] = deque()
        try:
            for batch in batches:
                waiting.append(self._pool.submit(_in_worker, function, batch))
                if len(waiting) > 2 * self._count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed, perhaps for want of memory", file="--workers", remedy="use fewer"
            ) from None

    def __enter__(self) -> Workers[_Made]:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    @cached_property
    def _alone(self) -> _Made:
        return self._make(*self._arguments)


def _begin(make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _made
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says how it ends
    _made = make(*arguments)


def _in_worker(function: Callable[[Any, _In], _Out], batch: _In) -> _Out:
    return function(_made, batch)
