"""log.jsonl and the event files: whole after every resume, and named where the disk takes no more."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from data_tools.files.errors import DataError
from megatron_patch.model import counts
from megatron_patch.parallel import device
from megatron_patch.train.loggers.event_files import EventFiles
from megatron_patch.train.metrics import Log
from megatron_patch.vision.shapes import flops_per_image
from tests.ranks import run_ranks
from tests.toy import SEEING, toy_recipe


def write_steps(run: Path, done: int, last: int, *overrides: str) -> None:
    """Log steps `done` + 1 to `last`, as an attempt does that is killed then: nothing is closed."""
    log = Log(toy_recipe(f"run.folder={run}", *overrides), 1, 9, done)
    for step in range(done + 1, last + 1):
        log.step(step, loss=float(step), grad_norm=1.0, learning_rate=1e-3, seconds=0.1)
    for logger in log._loggers:
        if isinstance(logger, EventFiles):
            logger._events.flush()


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_speed_counts_applied_layers_on_every_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "peak_flops", lambda: 1e9)
    recipe = toy_recipe(f"run.folder={tmp_path}", "run.log_interval=2")
    log = Log(recipe, 4, 10, 0)
    for step, seconds in ((1, 0.5), (2, 1.5)):
        log.step(step, loss=2.0, grad_norm=1.0, learning_rate=1e-3, seconds=seconds)
    tokens = 8 * 16  # of a step
    first, second = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (first["tokens"], second["tokens"], second["samples"]) == (tokens, 2 * tokens, 16)
    assert (first["tokens_per_second"], second["tokens_per_second"]) == (tokens / 0.5, tokens / 1.5)
    assert first["mfu"] == pytest.approx(tokens / 0.5 * counts.flops_per_token(recipe.model) / 4e9)
    assert log.eta_seconds == 8 * 1.0, "steps that are left, at the mean of the last ones"
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == ["2/10"] and f"MFU {second['mfu']:.1%}  ETA 0:00:08" in printed[0]


def test_the_mfu_of_a_model_that_sees_counts_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "peak_flops", lambda: 1e9)
    recipe = toy_recipe(f"run.folder={tmp_path}", *SEEING)
    Log(recipe, 1, 10, 0, images_per_row=2.5).step(1, loss=2.0, grad_norm=1.0, learning_rate=1e-3, seconds=0.5)
    vision, row = recipe.model.vision, 16 * counts.flops_per_token(recipe.model)
    assert vision is not None
    found = json.loads((tmp_path / "log.jsonl").read_text())["mfu"]
    assert found == pytest.approx(8 * (row + 2.5 * flops_per_image(vision, 32)) / 0.5 / 1e9)


@pytest.mark.parametrize(
    "damage",
    [
        b"garbage\n",
        b"{}\n",
        b'{"step": "2"}\n',
        b'{"step": 2.0}\n',
        b"[1]\n",
        b'{"step": 2, "loss": NaN}\n',
        b"\xff\xfe\n",
        bytes(4096) + b"\n",
    ],
)
def test_a_damaged_line_is_dropped_by_name_at_the_next_resume(
    tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    write_steps(tmp_path, 0, 4)
    path = tmp_path / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage, *lines[2:], b'{"step": 5, "loss"']))
    write_steps(tmp_path, 3, 5)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err == f"{path}, line 3: damaged, no record of a step; left out\n"


def on_a_full_disk(run: Path) -> tuple[str, str]:
    """On a rank: the error of a step whose line no longer fits, and what stands in the log then."""
    write_steps(run, 0, 2)
    log = Log(toy_recipe(f"run.folder={run}"), 1, 9, 2)
    # A limit of the process stands for the disk's: the system's answer is the same kind.
    resource.setrlimit(resource.RLIMIT_FSIZE, ((run / "log.jsonl").stat().st_size + 20, resource.RLIM_INFINITY))
    with pytest.raises(DataError) as caught:
        log.step(3, loss=3.0, grad_norm=1.0, learning_rate=1e-3, seconds=0.1)
    log.close()
    return str(caught.value), (run / "log.jsonl").read_text()


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    message, content = run_ranks(1, on_a_full_disk, tmp_path)[0]
    assert message.startswith(f"{tmp_path / 'log.jsonl'}: cannot write: ") and "free space" in message
    assert len(content.splitlines()) == 3 and not content.endswith("\n")
    write_steps(tmp_path, 2, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_event_files_hide_what_is_done_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for done, last in ((0, 6), (3, 5), (5, 7)):
        write_steps(tmp_path, done, last, "run.tensorboard=true")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(s, float(s)) for s in range(1, 8)]


def test_event_files_that_cannot_be_written_are_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("threading.excepthook", lambda _: None)  # tensorboard's own thread ends by the error
    log = Log(toy_recipe(f"run.folder={tmp_path}", "run.tensorboard=true"), 1, 99, 0)
    event_files = log._loggers[1]
    assert isinstance(event_files, EventFiles)
    event_files._events.flush()
    [file] = (tmp_path / "tensorboard").iterdir()
    file.unlink()
    file.symlink_to("/dev/full")
    for step in range(1, 51):
        log.step(step, loss=1.0, grad_norm=1.0, learning_rate=1e-3, seconds=0.1)
    log.close()
    assert steps(tmp_path) == list(range(1, 51))
    said = capsys.readouterr().err
    assert said.count(f"{tmp_path / 'tensorboard'}: cannot be written") == 1 and "No space left" in said
