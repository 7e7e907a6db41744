"""Batches worked on by processes: in their order, whatever takes longer, and no silence where one is killed."""

from __future__ import annotations

import os
import signal
import time

import pytest

from data_tools.chat.workers import Workers
from data_tools.files.errors import DataError


def slower_first(scale: int, batch: int) -> int:
    time.sleep(0.002 * (batch % 3 == 0))
    return scale * batch


def killed(_: int, batch: int) -> int:
    if batch == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_the_order_of_the_batches(count: int) -> None:
    with Workers(count, int, "7") as workers:
        assert list(workers(slower_first, iter(range(40)))) == [7 * n for n in range(40)]
        assert list(workers(slower_first, [])) == []


def test_a_worker_that_is_killed_is_said() -> None:
    with Workers(2, int) as workers, pytest.raises(DataError, match="a worker process was killed"):
        list(workers(killed, range(40)))


def test_alone_nothing_is_made_before_there_is_work() -> None:
    with Workers(1, int, "no number") as workers:
        assert list(workers(slower_first, [])) == []
        with pytest.raises(ValueError, match="no number"):
            list(workers(slower_first, [1]))
