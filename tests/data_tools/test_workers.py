"""`tokenize --workers`: however it ends, in one line, nothing runs on and nothing half-written is left."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_tools.conftest import ROOT
from tests.data_tools.test_durability import terminal_signals, tree


@pytest.fixture(scope="module")
def raw(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files of a source: four tasks."""
    folder = tmp_path_factory.mktemp("raw")
    content = (corpus / "starcoderdata" / "library.jsonl").read_bytes()[:1_500_000]
    content = content[: content.rindex(b"\n") + 1]
    for name in "abcd":
        (folder / f"{name}.jsonl").write_bytes(content)
    return folder


# Units that a small corpus has several of.
PROGRAM = """import sys
from data_tools.pack import units
units.PACK_BYTES = 1 << 20
from data_tools.build_amber import main
sys.exit(main())
"""


def command(raw: Path, corpus: Path, out: Path) -> list[str]:
    return [
        *(sys.executable, "-c", PROGRAM, "tokenize", "--source", "book", "--input", str(raw), "--output", str(out)),
        *("--tokenizer", str(corpus / "tokenizer.json"), "--workers", "2"),
    ]


@pytest.fixture(scope="module")
def undisturbed(raw: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(raw, corpus, out), cwd=ROOT, check=True)
    return tree(out)


def workers_of(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if b"multiprocessing-fork" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.parametrize(
    ("number", "whom", "code", "says"),
    [
        (signal.SIGINT, "group", 130, "interrupted: the same command goes on, finished work is kept\n"),
        (signal.SIGINT, "parent", 130, "interrupted: the same command goes on, finished work is kept\n"),
        (signal.SIGTERM, "parent", 143, "interrupted: the same command goes on, finished work is kept\n"),
        (
            signal.SIGKILL,
            "worker",
            1,
            "a worker process was killed, as the kernel does when memory runs out\n  remedy:",
        ),
        (signal.SIGKILL, "parent", -signal.SIGKILL, ""),
    ],
)
def test_however_it_ends_no_worker_is_left_and_the_next_run_goes_on(
    raw: Path,
    corpus: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    number: int,
    whom: str,
    code: int,
    says: str,
) -> None:
    out = tmp_path / "rows"
    stage = subprocess.Popen(
        command(raw, corpus, out),
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=terminal_signals,
    )  # fmt: skip
    while not list(out.glob("book/part_*.tokens.partial")):
        assert stage.poll() is None
    workers = workers_of(stage.pid)
    assert workers
    handles = [os.pidfd_open(worker) for worker in workers]
    if whom == "group":
        os.killpg(stage.pid, number)
    else:
        os.kill(stage.pid if whom == "parent" else workers[0], number)
    said = stage.communicate(timeout=60)[1]  # ends when no worker holds the pipe any more
    assert stage.returncode == code
    assert says in said and "Traceback" not in said
    if says:
        told = [line for line in said.splitlines() if " is a copy of " not in line]  # two sources have like texts
        assert len(told) == says.count("\n") + (not says.endswith("\n"))
        assert not list(out.glob("book/*.partial"))
    for handle in handles:
        assert select.select([handle], [], [], 60)[0]  # it has ended
        os.close(handle)
    subprocess.run(command(raw, corpus, out), cwd=ROOT, check=True)
    assert tree(out) == undisturbed
