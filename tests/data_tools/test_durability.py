"""Killed anywhere and run again, every stage ends with the bytes of an undisturbed run."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.files.durable import LOCK_NAME, folder_lock, reserve, write_beside
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.index.index_segments import index, plan_dataset
from data_tools.pack import mix as mix_module
from data_tools.pack.mix import MixOptions, mix
from data_tools.pack.tokenize_source import tokenize_source
from tests.data_tools.conftest import build_amber

ROW_LENGTH, NUM_SEGMENTS = 65, 3
KILLS = int(os.environ.get("KILLS", "20"))
UNFINISHED = (".partial", ".journal")
Stage = Callable[[Path], object]


@pytest.fixture(scope="module")
def stages(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    """Each stage as a function of its output folder, cut into many small steps."""
    base = tmp_path_factory.mktemp("inputs")
    tokenizer = small_corpus / "tokenizer.json"

    def tokenize(output: Path) -> None:
        for source in ("wikipedia", "stackexchange", "starcoderdata"):
            tokenize_source(source, small_corpus / source, output, tokenizer, row_length=ROW_LENGTH, task_bytes=1 << 14)

    def mix_with(direct: bool) -> Stage:
        return lambda output: mix(base / "rows", output, MixOptions(NUM_SEGMENTS, direct, 3, 1))

    def index_all(output: Path) -> object:
        return index(base / "segments", output, plan_dataset(base / "segments", None, None), ErrorPolicy(), threads=2)

    tokenize(base / "rows")
    mix_with(False)(base / "segments")

    def mix_segments(output: Path) -> None:
        for segment in range(NUM_SEGMENTS):
            mix(base / "rows", output, MixOptions(NUM_SEGMENTS, True, 3, 1), range(segment, segment + 1))
        mix_with(True)(output)

    return {
        "tokenize": tokenize,
        "mix": mix_with(False),
        "mix --direct": mix_with(True),
        "mix --segment": mix_segments,
        "index": index_all,
    }


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix_module, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(mix_module, "JOURNAL_BYTES", 1 << 15)


def tree(folder: Path) -> dict[str, bytes]:
    """All files but locks and what says of itself that it is unfinished."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(LOCK_NAME) and not path.name.endswith(UNFINISHED)
    }


def run_and_kill(stage: Stage, output: Path, *, after_s: float | None, at_sync: int | None) -> bool:
    """Runs a stage in a forked process and kills it; returns whether it was killed before it ended."""
    child = os.fork()
    if child == 0:
        code = 70
        with contextlib.suppress(BaseException):
            if at_sync is not None:
                kill_at_sync(at_sync)
            stage(output)
            code = 0
        os._exit(code)
    if after_s is not None:
        descriptor = os.pidfd_open(child)
        ended, _, _ = select.select([descriptor], [], [], after_s)
        os.close(descriptor)
        if not ended:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def kill_at_sync(count: int) -> None:
    """This process kills itself at its n-th fsync or rename: just before it, or just after."""
    real = {"fsync": os.fsync, "replace": Path.replace}
    calls = 0

    def patched(name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == count and count % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real[name](*arguments)  # type: ignore[operator]
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.fsync = patched("fsync")  # type: ignore[assignment]
    Path.replace = patched("replace")  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("name", ["tokenize", "mix", "mix --direct", "mix --segment", "index"])
def test_killed_at_random_points_it_ends_byte_equal(name: str, stages: dict[str, Stage], tmp_path: Path) -> None:
    stage = stages[name]
    begun = time.monotonic()
    stage(tmp_path / "undisturbed")
    duration = time.monotonic() - begun
    expected = tree(tmp_path / "undisturbed")
    chance = random.Random(name)
    kills = rounds = 0
    while kills < KILLS:
        output = tmp_path / f"round_{rounds}"
        rounds += 1
        killed = True
        for attempt in range(6):
            by_time = chance.random() < 0.5
            killed = run_and_kill(
                stage,
                output,
                after_s=chance.uniform(0, 1.5 * duration) if by_time else None,
                at_sync=None if by_time else chance.randint(1, 60),
            )
            kills += killed
            for path, content in tree(output).items() if output.exists() else []:
                assert content == expected[path], f"half-written: {path} after attempt {attempt}"
            if not killed:
                break
        if killed:
            stage(output)
        assert tree(output) == expected
        assert not [path for path in output.rglob("*") if path.name.endswith(UNFINISHED)]


@pytest.mark.parametrize("name", ["tokenize", "mix", "mix --direct", "mix --segment", "index"])
def test_a_full_disk_names_the_file_and_leaves_nothing_broken(
    name: str, stages: dict[str, Stage], tmp_path: Path
) -> None:
    stages[name](tmp_path / "undisturbed")
    expected = tree(tmp_path / "undisturbed")
    limit = max(map(len, expected.values())) // 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(DataError, match="cannot write: File too large") as error:
            stages[name](tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert Path(error.value.file).is_relative_to(tmp_path / "out")
    for path, content in tree(tmp_path / "out").items():
        assert content == expected[path]
    stages[name](tmp_path / "out")
    assert tree(tmp_path / "out") == expected


@pytest.mark.parametrize("name", ["tokenize", "mix", "mix --direct", "index"])
def test_a_second_run_on_a_folder_says_so_and_stops(name: str, stages: dict[str, Stage], tmp_path: Path) -> None:
    held = tmp_path / "starcoderdata" if name == "tokenize" else tmp_path
    for source in ("wikipedia", "stackexchange"):
        (tmp_path / source).mkdir()
    with folder_lock(held), pytest.raises(DataError, match="another run is writing this folder"):
        stages[name](tmp_path)


def test_the_command_says_it_in_one_line(stages: dict[str, Stage], small_corpus: Path, tmp_path: Path) -> None:
    with folder_lock(tmp_path / "wikipedia"):
        result = build_amber(
            *("tokenize", "--input", small_corpus / "wikipedia", "--source", "wikipedia", "--output", tmp_path),
            *("--tokenizer", small_corpus / "tokenizer.json", "--workers", 1),
            check=False,
        )
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {tmp_path / 'wikipedia'}: .lock: another run is writing this folder\n")
    assert "Traceback" not in result.stderr


def test_what_was_reserved_and_not_used_is_given_back(tmp_path: Path) -> None:
    with write_beside(tmp_path / "file") as stream:
        stream.write(b"1" * 5000)
        reserve(stream)
    status = (tmp_path / "file").stat()
    assert status.st_size == 5000
    assert status.st_blocks * 512 < 1 << 20


def test_a_file_system_without_locks_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:  # what Lustre answers that is mounted without them
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("data_tools.files.durable.fcntl.flock", no_locks)
    with pytest.raises(DataError, match=r"has no locks .*(?s:.)*-o flock"), folder_lock(tmp_path):
        pass


@pytest.mark.parametrize("name", ["tokenize", "mix", "mix --direct", "index"])
def test_a_finished_folder_is_not_written_again(name: str, stages: dict[str, Stage], tmp_path: Path) -> None:
    stages[name](tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*_0*.*")}
    stages[name](tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_segment_that_the_mix_does_not_have_is_refused(stages: dict[str, Stage], tmp_path: Path) -> None:
    stages["tokenize"](tmp_path / "rows")
    for direct in (False, True):
        with pytest.raises(DataError, match=r"no segment 3: there are 3"):
            mix(tmp_path / "rows", tmp_path / "out", MixOptions(3, direct, 0, 1), range(2, 4))
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    row = json.dumps({"token_ids": [1, 2, 3, 4], "source": "arxiv"}) + "\n"
    (tmp_path / "train_000.jsonl").write_text(row * 500_000)
    out = tmp_path / "data"
    command = [sys.executable, "data_tools/build_amber.py", "index", "--input", tmp_path, "--output", out]
    stage = subprocess.Popen(
        [*command, "--row-length", "4"], stderr=subprocess.PIPE, text=True, preexec_fn=terminal_signals
    )
    while not (out / "segment_000.bin.partial").exists():
        assert stage.poll() is None
    stage.send_signal(signal.SIGINT)
    said = stage.communicate()[1]
    assert stage.returncode == 130
    assert said.endswith("interrupted: the same command goes on, finished work is kept\n") and "Traceback" not in said
    assert not [path for path in out.iterdir() if not path.name.startswith(".lock")]


def terminal_signals() -> None:
    """A test suite in the background of a shell ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
