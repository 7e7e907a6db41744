"""A staged or read-ahead segment gives the same rows; staging is once a node, checked, and gives way when it cannot."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from data_tools.files.errors import DataError
from megatron_patch.data import ahead
from megatron_patch.data.segments import open_segments
from tests.data.conftest import NUM_SEGMENTS, ROW_LENGTH, ROWS, VOCAB

EVERY = np.arange(ROWS)


def staged(folder: Path) -> list[str]:
    return sorted(path.name[:11] for path in folder.glob("*.bin"))


def test_read_ahead_changes_no_row(data_set) -> None:
    folder, rows, _ = data_set
    segments = open_segments(folder, row_length=ROW_LENGTH, vocab_size=VOCAB, read_ahead=True)
    for k in (0, 1, 2, 0):
        np.testing.assert_array_equal(segments.read(k, EVERY), rows[k])
    segments.close()


def test_the_segment_after_the_one_in_use_is_read_through(data_set, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, *_ = data_set
    read: list[str] = []

    def advised(descriptor: int, *_: int) -> None:
        read.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    monkeypatch.setattr("megatron_patch.data.ahead.os.posix_fadvise", advised)
    for wanted, expected in ((True, ["segment_000.bin", "segment_001.bin"]), (False, [])):
        read.clear()
        segments = open_segments(folder, row_length=ROW_LENGTH, vocab_size=VOCAB, read_ahead=wanted)
        segments.read(0, EVERY)
        segments.read(0, EVERY)
        for coming in segments._ahead._coming.values():
            coming.result()
        assert read == expected
        segments.close()


def test_segments_are_staged_one_ahead_and_removed_behind(data_set, tmp_path: Path) -> None:
    folder, rows, _ = data_set
    scratch = tmp_path / "scratch"
    segments = open_segments(folder, row_length=ROW_LENGTH, vocab_size=VOCAB, stage_folder=scratch)
    for k in range(NUM_SEGMENTS):
        np.testing.assert_array_equal(segments.read(k, EVERY), rows[k])
        assert not [name for name in staged(scratch) if name < f"segment_{k:03d}"]
        assert f"segment_{k:03d}" in staged(scratch)
    (folder / "segment_000.bin").unlink()  # staged rows do not need it
    np.testing.assert_array_equal(segments.read(2, EVERY), rows[2])
    segments.close()
    assert not list(scratch.glob("*.partial"))


def test_ranks_of_a_node_copy_a_segment_once(data_set, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rows, _ = data_set
    copied: list[str] = []
    real, both_started = ahead._copy, threading.Barrier(2)

    def counted(source: Path, target: Path) -> str:
        copied.append(source.name)
        return real(source, target)

    monkeypatch.setattr(ahead, "_copy", counted)
    results: list[np.ndarray] = []

    def rank() -> None:
        segments = open_segments(folder, row_length=ROW_LENGTH, vocab_size=VOCAB, stage_folder=tmp_path / "scratch")
        both_started.wait()
        results.append(segments.read(0, EVERY))
        segments.close()

    threads = [threading.Thread(target=rank) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(results, [rows[0], rows[0]])
    assert copied.count("segment_000.bin") == 1


def test_damage_is_found_while_staging(data_set, tmp_path: Path) -> None:
    folder, *_ = data_set
    path = folder / "segment_001.bin"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    segments = open_segments(folder, row_length=ROW_LENGTH, vocab_size=VOCAB, stage_folder=tmp_path / "scratch")
    segments.read(0, EVERY)
    with pytest.raises(DataError, match=r"segment_001.bin: its digest is"):
        segments.read(1, EVERY)


@pytest.mark.parametrize("place", ["file", "file/scratch", "/proc/scratch"])
def test_a_place_where_nothing_can_be_staged_is_refused_at_once(data_set, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=rf"{place}: no folder on .* that segments can be copied to"):
        open_segments(data_set[0], row_length=ROW_LENGTH, vocab_size=VOCAB, stage_folder=tmp_path / place)


def test_without_room_the_data_set_itself_is_read(data_set, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rows, _ = data_set

    def full(source: Path, target: Path) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ahead, "_copy", full)
    segments = open_segments(folder, row_length=ROW_LENGTH, vocab_size=VOCAB, stage_folder=tmp_path / "scratch")
    with pytest.warns(UserWarning, match="reading it where it lies"):
        np.testing.assert_array_equal(segments.read(0, EVERY), rows[0])
        segments.close()
