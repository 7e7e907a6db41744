"""Ranks that wait for others say for whom, and a signal ends the wait."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_patch.launch import LaunchError, WaitEnded
from megatron_patch.parallel import meeting
from megatron_patch.train import loop, signals
from tests.toy import TOY

_FORK = multiprocessing.get_context("fork")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def place(rank: int, world_size: int, port: int) -> None:
    sizes = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    os.environ.update({name: str(value) for name, value in (sizes | {"MASTER_PORT": port}).items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"


def train_alone(rank: int, port: int, overrides: list[str], log: Path) -> None:
    """`train` as one rank of four, whose others nobody starts: a leftover of another launcher in the environment."""
    sys.stdout = sys.stderr = log.open("a", buffering=1)
    place(rank, 4, port)
    meeting._FIRST_WORD = 0.0
    signals._SHORT_WAIT = 0.2
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal, though the tests may run under nohup
    signals.hold()
    sys.exit(loop.main(argparse.Namespace(recipe=Path("recipes/demo.yaml"), overrides=overrides, accept_changes=False)))


@pytest.mark.parametrize(
    ("rank", "number", "whom"),
    [
        (0, signal.SIGTERM, "3 of 4 ranks: 1-3"),
        (0, signal.SIGHUP, "3 of 4 ranks: 1-3"),
        (3, signal.SIGINT, "rank 0 at 127.0.0.1, port {port}"),
    ],
)
def test_a_rank_that_waits_for_others_obeys_signals(
    data_folder: Path, tmp_path: Path, rank: int, number: signal.Signals, whom: str
) -> None:
    run, log, port = tmp_path / "run", tmp_path / "log", free_port()
    log.touch()
    overrides = [*TOY, f"data.folder={data_folder}", f"run.folder={run}", "data.held_out_rows=8", "run.steps=4"]
    process = _FORK.Process(target=train_alone, args=(rank, port, overrides, log), daemon=True)
    process.start()
    try:
        deadline = time.monotonic() + 60
        while f"waiting for {whom.format(port=port)}" not in log.read_text():
            assert process.is_alive() and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        os.kill(int(process.pid or 0), number)
        process.join(30)
        assert process.exitcode == 1, log.read_text()
    finally:
        process.kill()
    said = f"{number.name} while waiting for {whom.format(port=port)}; no step was done"
    assert f"stopped on rank {rank}: {said}" in log.read_text() and "Traceback" not in log.read_text()
    if rank == 0:
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["reason"]) == ("stopped", said)


@pytest.fixture
def agents_store(monkeypatch: pytest.MonkeyPatch) -> meeting.TCPStore:
    """Of torchrun, which keeps it while ranks come and go."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return meeting.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def come(rank: int, store: meeting.TCPStore, asked: Callable[[], str | None]) -> None:
    place(rank, 2, store.port)
    meeting.meet("127.0.0.1", store.port, meeting.timedelta(seconds=20), asked)


def test_a_rank_that_has_given_up_is_not_counted_in(agents_store: meeting.TCPStore) -> None:
    with pytest.raises(WaitEnded, match=r"^SIGHUP while waiting for 1 of 2 ranks: 0; no step was done"):
        come(1, agents_store, lambda: "SIGHUP")
    with pytest.raises(WaitEnded, match=r"^rank 1: SIGHUP while waiting for 1 of 2 ranks: 0; no step was done"):
        come(0, agents_store, lambda: None)


def test_a_rank_goes_on_where_the_last_one_came_as_it_gave_up(agents_store: meeting.TCPStore) -> None:
    def as_the_other_comes() -> str:
        if not agents_store.check([meeting._OUTCOME]):
            come(0, agents_store, lambda: None)
        return "SIGHUP"

    come(1, agents_store, as_the_other_comes)
    assert agents_store.get(meeting._OUTCOME).decode() == meeting._ALL_HERE


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    place(0, 6, free_port())
    looks = iter(range(10**6))

    def others_come() -> None:
        if next(looks) == 1:
            client = meeting.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 6, wait_for_workers=False)
            client.set(meeting._key(3), "a node")

    port = int(os.environ["MASTER_PORT"])
    with pytest.raises(LaunchError, match=r"waited 1 s for 4 of 6 ranks: 1-2, 4-5; start every rank"):
        meeting.meet("127.0.0.1", port, meeting.timedelta(seconds=1), others_come)
