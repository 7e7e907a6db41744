"""A small data set of random rows, built by the tool's own commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_tools.dataset.format import AMBER_SOURCES, TokenizerRecord, segment_name
from data_tools.dataset.segment_files import DatasetPlan, write_companions, write_dataset_manifest
from data_tools.files.digest import new_digest, sha256_file

NUM_SEGMENTS, ROWS, ROW_LENGTH, VOCAB, HELD_OUT = 3, 25, 9, 64, 7


def write_rows(base: Path, rows: np.ndarray, codes: np.ndarray, plan: DatasetPlan) -> None:
    """One segment's files from arrays."""
    base.with_suffix(".bin").write_bytes(rows.tobytes())
    digest = new_digest()
    digest.update(rows.tobytes())
    write_companions(base, [codes.tobytes()], len(rows), plan, 0, {"file": "made by a test"}, digest.hexdigest())


@pytest.fixture
def data_set(tmp_path: Path) -> tuple[Path, list[np.ndarray], np.ndarray]:
    """Folder, rows of each segment, held-out rows."""
    random = np.random.RandomState(0)
    (tmp_path / "tokenizer.json").write_text("{}")
    record = TokenizerRecord("tokenizer.json", sha256_file(tmp_path / "tokenizer.json"), VOCAB)
    plan = DatasetPlan(NUM_SEGMENTS, ROW_LENGTH, VOCAB, record, has_held_out=True)
    segments = [random.randint(0, VOCAB, (ROWS, ROW_LENGTH)).astype("<u2") for _ in range(NUM_SEGMENTS)]
    held_out = random.randint(0, VOCAB, (HELD_OUT, ROW_LENGTH)).astype("<u2")
    for name, rows in [*((segment_name(k), rows) for k, rows in enumerate(segments)), ("held_out", held_out)]:
        codes = (np.arange(len(rows)) % len(AMBER_SOURCES)).astype(np.uint8)
        write_rows(tmp_path / name, rows, codes, plan)
    write_dataset_manifest(tmp_path, plan)
    return tmp_path, segments, held_out
