"""The demo corpus, built once, and the command line as its users run it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools import demo_corpus

ROOT = Path(__file__).resolve().parents[2]
Build = Callable[..., "subprocess.CompletedProcess[str]"]


def build_amber(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs `python data_tools/build_amber.py ...` from the repository root."""
    command = [sys.executable, "data_tools/build_amber.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=check, capture_output=True, text=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's raw sources and tokenizer, with a smaller vocabulary."""
    folder = tmp_path_factory.mktemp("corpus")
    demo_corpus.build(folder, vocab_size=1024)
    return folder


@pytest.fixture(scope="session")
def small_corpus(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 12 documents of every source of the demo corpus, in two files a source."""
    folder = tmp_path_factory.mktemp("small")
    for name in ("tokenizer.model", "tokenizer.json"):
        (folder / name).write_bytes((corpus / name).read_bytes())
    for source in ("wikipedia", "stackexchange", "starcoderdata"):
        (folder / source).mkdir()
        lines = next((corpus / source).glob("*.jsonl")).read_bytes().splitlines(keepends=True)
        (folder / source / "a.jsonl").write_bytes(b"".join(lines[:5]))
        (folder / source / "b.jsonl").write_bytes(b"".join(lines[5:12]))
    return folder
