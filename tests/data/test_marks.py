"""What is said of a row follows it to whichever rank reads it, in every epoch; damage to it is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_tools.dataset.format import MARKS, pack_marks, segment_name, unpack_marks
from data_tools.dataset.segment_files import DatasetPlan, write_companions, write_dataset_manifest
from data_tools.files.digest import new_digest
from data_tools.files.errors import DataError
from megatron_patch.data.loader import Loader, held_out_shards
from megatron_patch.data.marks import Marks, boundaries
from megatron_patch.data.order import SampleOrder
from megatron_patch.data.segments import open_segments
from megatron_patch.data.sharding import accumulation_steps

SEGMENTS, ROWS, ROW_LENGTH, VOCAB, BATCH, EPOCHS = 2, 45, 13, 64, 20, 3


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray], dict[str, Marks]]:
    """Folder, and by segment the rows and their marks; no two rows are equal, nor count as much."""
    folder, random = tmp_path_factory.mktemp("marked"), np.random.RandomState(0)
    plan = DatasetPlan(SEGMENTS, ROW_LENGTH, VOCAB, None, has_held_out=True)
    rows, marks = {}, {}
    for name in [*map(segment_name, range(SEGMENTS)), "held_out"]:
        rows[name] = random.randint(0, VOCAB, (ROWS, ROW_LENGTH)).astype("<u2")
        starts, counted = random.rand(2, ROWS, ROW_LENGTH) < 0.3
        starts[:, 0] = counted[:, 5] = True
        marks[name] = Marks(counted, starts)
        (folder / f"{name}.bin").write_bytes(rows[name].tobytes())
        digest = new_digest()
        digest.update(rows[name].tobytes())
        stored = {suffix: [pack_marks(field).tobytes()] for suffix, field in zip(MARKS, (counted, starts), strict=True)}
        write_companions(folder / name, [bytes(ROWS)], ROWS, plan, 0, {}, digest.hexdigest(), stored)
    write_dataset_manifest(folder, plan)
    return folder, rows, marks


def loaders(folder: Path, ranks: int, samples_consumed: int = 0, stage_folder: Path | None = None) -> list[Loader]:
    segments = open_segments(
        folder, row_length=ROW_LENGTH, vocab_size=VOCAB, stage_folder=stage_folder, again=EPOCHS > 1
    )
    return [
        Loader(
            segments,
            SampleOrder(SEGMENTS, ROWS, BATCH, 7, EPOCHS),
            data_parallel_rank=rank,
            data_parallel_size=ranks,
            micro_batch_size=1,
            num_micro_batches=accumulation_steps(BATCH, ranks, 1, 1),
            samples_consumed=samples_consumed,
        )
        for rank in range(ranks)
    ]


def steps(folder: Path, ranks: int, samples_consumed: int = 0, **more) -> list[tuple[int, frozenset[int]]]:
    """Of each step from a position on: the segment and the rows that the ranks together read; each checked."""
    seen = []
    for shards in zip(*loaders(folder, ranks, samples_consumed, **more), strict=True):
        [(segment, labels)] = {(shard.segment, shard.labels) for shard in shards}
        real = [shard.rows[shard.weights > 0] for shard in shards]
        seen.append((segment, frozenset(np.concatenate(real).tolist())))
        assert sum(map(len, real)) == len(seen[-1][1]) == BATCH
        counted = sum(int(shard.marks.counted[..., 1:].sum()) for shard in shards)
        assert counted == labels, "what the loss is divided by is what counts on all ranks together"
    return seen


@pytest.mark.parametrize("ranks", [1, 19, 20])
def test_marks_follow_their_rows(marked, ranks: int) -> None:
    folder, rows, marks = marked
    for loader in loaders(folder, ranks):
        for shard in loader:
            real, name = shard.weights > 0, segment_name(shard.segment)
            np.testing.assert_array_equal(shard.tokens[real], rows[name][shard.rows[real]])
            for ours, whole in zip(shard.marks[:2], marks[name][:2], strict=True):
                np.testing.assert_array_equal(ours[real], whole[shard.rows[real]])
            assert not shard.marks.counted[~real].any() and shard.marks.starts[..., 0].all()


def test_every_epoch_has_an_order_of_its_own_and_any_number_of_ranks_the_same_rows(marked, tmp_path: Path) -> None:
    folder, *_ = marked
    whole = steps(folder, 20)
    a_segment = ROWS // BATCH
    assert [segment for segment, _ in whole] == [0] * a_segment + [1] * a_segment + [0] * a_segment + [
        1
    ] * a_segment + [0] * a_segment + [1] * a_segment
    assert len(set(whole)) == len(whole) == EPOCHS * SEGMENTS * a_segment
    middle = len(whole) // 2  # of epoch 2
    assert steps(folder, 19, middle * BATCH) == whole[middle:]
    assert steps(folder, 1, middle * BATCH, stage_folder=tmp_path) == whole[middle:]
    first = np.random.RandomState(7 + SEGMENTS).permutation(ROWS)[:BATCH]  # visit 2 is segment 0 once more
    assert whole[SEGMENTS * a_segment] == (0, frozenset(first.tolist()))


def test_marks_are_staged_beside_the_ids(marked, tmp_path: Path) -> None:
    """Once on the node, nothing is read where the data set lies; what is copied is compared with its digests."""
    folder, scratch = tmp_path / "data", tmp_path / "scratch"
    shutil.copytree(marked[0], folder)
    shape = {"row_length": ROW_LENGTH, "vocab_size": VOCAB, "stage_folder": scratch}
    segments = open_segments(folder, **shape)
    segments.read(0, np.arange(ROWS))
    segments.close()
    assert {path.suffix for path in scratch.glob("segment_000-*")} >= {".bin", ".mask", ".starts"}
    for suffix in ("bin", *MARKS):
        path = folder / f"segment_000.{suffix}"
        path.write_bytes(bytes(path.stat().st_size))
    segments = open_segments(folder, **shape)
    np.testing.assert_array_equal(segments.read(0, np.arange(ROWS)), marked[1]["segment_000"])
    np.testing.assert_array_equal(segments.marks(0, np.arange(ROWS))[:2], marked[2]["segment_000"][:2])
    segments.read(1, np.arange(ROWS))
    segments.close()
    assert {path.suffix for path in scratch.glob("segment_000-*")} == {".lock"}, "removed behind"
    segments = open_segments(folder, **{**shape, "stage_folder": tmp_path / "other"})
    with pytest.raises(DataError, match=r"segment_000.bin: its digest is"):
        segments.marks(0, np.arange(ROWS))
    (folder / "segment_000.bin").write_bytes(marked[1]["segment_000"].tobytes())
    segments = open_segments(folder, **{**shape, "stage_folder": tmp_path / "other"})
    with pytest.raises(DataError, match=r"segment_000.mask: its digest is"):
        segments.read(0, np.arange(ROWS))


def test_held_out_labels_are_counted(marked) -> None:
    folder, _, marks = marked
    segments = open_segments(folder, row_length=ROW_LENGTH, vocab_size=VOCAB)
    sharding = {
        "data_parallel_size": 3,
        "micro_batch_size": 2,
        "num_micro_batches": accumulation_steps(BATCH, 3, 2, 1),
    }
    shards = [
        held_out_shards(segments, num_rows=30, global_batch_size=BATCH, data_parallel_rank=rank, **sharding)
        for rank in range(3)
    ]
    labels = [[shard.labels for shard in mine] for mine in shards]
    counted = marks["held_out"].counted[:, 1:]
    assert labels == [[counted[:BATCH].sum(), counted[BATCH:30].sum()]] * 3


def test_boundaries_are_those_of_all_rows() -> None:
    starts = np.array([[1, 0, 0, 1], [1, 1, 0, 0]], dtype=bool)
    cumulative, positions = boundaries(starts)
    assert cumulative.tolist() == [0, 3, 4, 5, 8] and cumulative.dtype == np.int32
    assert positions.tolist() == [0, 1, 2, 0, 0, 0, 1, 2]


@pytest.mark.parametrize("row_length", [1, 7, 8, 9, 2049])
def test_marks_come_back_as_they_were(row_length: int) -> None:
    marks = np.random.RandomState(row_length).rand(5, row_length) < 0.5
    np.testing.assert_array_equal(unpack_marks(pack_marks(marks), row_length), marks)


@pytest.mark.parametrize("suffix", MARKS)
@pytest.mark.parametrize("damage", ["short", "gone", "zeros"])
def test_damaged_marks_are_refused(marked, tmp_path: Path, suffix: str, damage: str) -> None:
    for file in marked[0].iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / f"segment_001.{suffix}"
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-1] if damage == "short" else bytes(len(content)))
    with pytest.raises(DataError) as error:
        segments = open_segments(tmp_path, row_length=ROW_LENGTH, vocab_size=VOCAB)
        segments.marks(1, np.arange(3))
    assert "segment_001" in str(error.value) and "remedy" in str(error.value)
