"""Services that take a run's numbers, with the real library: one run through all attempts, and never in the way."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_patch.recipe import RecipeError
from megatron_patch.train.loggers import follow, service
from megatron_patch.train.loggers.logger import RunOfService
from megatron_patch.train.metrics import Log, check_loggers
from tests.toy import toy_recipe


def attempt(run: Path, done: int, last: int) -> Log:
    """An attempt that goes on from step `done` has logged up to step `last`."""
    recipe = toy_recipe(f"run.folder={run}", "run.loggers=[wandb]")
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    log = Log(recipe, 1, 9, done)
    for step in range(done + 1, last + 1):
        log.step(step, loss=step / 7, grad_norm=1.0, learning_rate=1e-3, seconds=0.1)
    return log


def wandb_records(file: Path) -> Iterator[Any]:
    """What `wandb sync` would send: LevelDB's log format (blocks of 32 KiB), each entry a protobuf of the library's."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, whole = file.read_bytes(), 7, b""  # behind the library's own header
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def history(folder: Path) -> tuple[str, dict[int, dict[str, float]], bool]:
    """Id, steps with their numbers, and whether an offline run was finished."""
    [file] = folder.glob("*.wandb")
    run_id, steps, is_finished = "", {}, False
    for record in wandb_records(file):
        if record.HasField("run"):
            run_id = record.run.run_id
        if record.HasField("history"):
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            steps[items["_step"]] = {key: value for key, value in items.items() if not key.startswith("_")}
        is_finished |= record.HasField("exit")
    return run_id, steps, is_finished


def test_wandb_offline_has_every_attempt_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt is killed, the second goes on from before its end."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    if not (child := os.fork()):
        attempt(run, 0, 6)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    log = attempt(run, 3, 8)
    log.held_out(8, 1.5)
    log.close()
    folders: list[Path] = []
    end = time.monotonic() + 120
    while len(folders) < 2 or not all(history(folder)[2] for folder in folders):
        assert time.monotonic() < end, (run / "loggers/wandb.log").read_text()
        time.sleep(0.1)
        folders = [f for f in (run / "loggers/wandb").glob("offline-run-*") if list(f.glob("*.wandb"))]
    (first_id, first, _), (second_id, second, _) = sorted(map(history, folders), key=lambda h: min(h[1]))
    assert first_id == second_id == (run / "loggers/run_id").read_text().strip()
    assert not any(f.name.endswith(first_id) for f in folders), "attempts of one second have a folder each"
    assert (list(first), list(second)) == ([1, 2, 3, 4, 5, 6], [4, 5, 6, 7, 8])
    assert second[8]["held_out_loss"] == 1.5
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for record in (record for record in logged if "loss" in record and record["step"] > 3):
        assert {"loss", "tokens", "grad_norm"} <= set(second[record["step"]]) <= set(record) | {"held_out_loss"}
        assert second[record["step"]]["loss"] == record["loss"]


def test_a_service_that_never_answers_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:  # connections are taken, and nobody reads them
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{hole.getsockname()[1]}")
        monkeypatch.setattr(service, "SECONDS_TO_FINISH", 1)
        log = attempt(tmp_path / "run", 0, 6)
        log.close()
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().err.count("run.loggers: wandb did not take all of this attempt") == 1


class Shaky:
    """A service that is away at first, and that goes away once more in the middle."""

    taken: list[int] = []  # noqa: RUF012  kept by the service, not by a connection to it
    tries = 0

    def __init__(self) -> None:
        Shaky.tries += 1
        if Shaky.tries == 1:
            raise ConnectionError("the door is shut\nand more")
        self.step = max(self.taken, default=0)

    def write(self, record: Mapping[str, Any]) -> None:
        if record["step"] == 4 and Shaky.tries == 2:
            raise TimeoutError
        self.taken.append(record["step"])

    def close(self) -> None:
        pass


class Ended:
    is_over = True

    def wait(self, seconds: float) -> None:
        raise AssertionError("nothing is left to wait for")


class Running:
    """Over once everything is sent."""

    @property
    def is_over(self) -> bool:
        return Shaky.taken[-1:] == [6]

    def wait(self, seconds: float) -> None:
        pass


def test_after_an_outage_the_service_gets_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f'{{"step": {step}, "loss": 1.0}}\n' for step in (1, 2, 3, 4, 5, 6)]
    log = io.BytesIO("".join([*lines[:3], "damaged\n", *lines[3:]]).encode())
    monkeypatch.setattr(follow, "open_service", lambda name, run: Shaky())
    run, people = RunOfService("a", "a", 0, {}, tmp_path), io.StringIO()
    assert follow.follow(log, "shaky", run, Running(), people) == 0
    assert (Shaky.taken, Shaky.tries) == ([1, 2, 3, 4, 5, 6], 3)
    away, back = "cannot be reached ({}); trying again every minute", "is there again"
    said = [away.format("the door is shut"), back, away.format("TimeoutError"), back]
    assert people.getvalue().splitlines() == [f"run.loggers: shaky {words}" for words in said]
    Shaky.tries = 0
    assert follow.follow(log, "shaky", run, Ended(), people) == 3, "away to the end"


def test_a_service_without_its_library_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    check_loggers(toy_recipe("run.loggers=[wandb]"))
    monkeypatch.setattr(service, "is_installed", lambda name: False)
    check_loggers(toy_recipe())
    with pytest.raises(RecipeError, match=r"run\.loggers: wandb is not installed; `pip install wandb`"):
        check_loggers(toy_recipe("run.loggers=[wandb]"))
    with pytest.raises(RecipeError, match=r"run\.loggers: named twice: wandb"):
        toy_recipe("run.loggers=[wandb, wandb]")
