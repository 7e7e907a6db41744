"""Every bit flip, truncation and loss in a checkpoint is found before the first step, with the file's name."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.files.digest import digest_file
from megatron_patch.train.checkpoint import CheckpointError, open_checkpoint
from megatron_patch.train.checkpoint.format import Marker, StoredFile, to_json
from tests.train.job import Job, write_data_set

DAMAGES = 600


def settings(data_folder: Path, run: Path, steps: int) -> list[str]:
    return [
        f"data.folder={data_folder}",
        f"run.folder={run}",
        f"run.steps={steps}",
        "precision=bf16",
        "parallel.tensor=2",
        "batch.micro_batch_size=8",
        "optimizer.decay_steps=20",
        "checkpoint.interval_steps=2",
        "data.held_out_interval=0",
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set, and a run with checkpoints of steps 2 and 4."""
    root = tmp_path_factory.mktemp("corruption")
    data_folder = write_data_set(root / "data")
    Job(2, settings(data_folder, root / "run", 4), root / "log").run()
    return data_folder, root / "run"


def flip_bit(dice: random.Random, content: bytes) -> bytes:
    place = dice.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1 :]


def truncate(dice: random.Random, content: bytes) -> bytes:
    return content[: dice.randrange(len(content))]


def lengthen(dice: random.Random, content: bytes) -> bytes:
    return content + dice.randbytes(dice.randint(1, 100))


def blank(dice: random.Random, content: bytes) -> bytes:
    """A block of zeros, as a disk leaves for what never reached it; at least one byte changes."""
    start = dice.randrange(len(content))
    end = start + dice.randint(1, 4096)
    blanked = content[:start] + bytes(len(content[start:end])) + content[end:]
    return blanked if blanked != content else flip_bit(dice, content)


def test_every_damage_is_found(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "step_00000004"
    shutil.copytree(made[1] / "checkpoints" / folder.name, folder)
    open_checkpoint(folder).close()
    files = sorted(folder.iterdir())
    assert [p.name for p in files] == ["COMPLETE", "index.json", "rank_00000.safetensors", "rank_00001.safetensors"]
    kinds: list[Callable[[random.Random, bytes], bytes]] = [flip_bit, truncate, lengthen, blank]
    for seed in range(DAMAGES):
        dice = random.Random(seed)
        path, kind = files[seed % len(files)], kinds[seed // len(files) % len(kinds)]
        whole = path.read_bytes()
        path.write_bytes(kind(dice, whole))
        with pytest.raises(CheckpointError, match=path.name):
            open_checkpoint(folder)
        path.write_bytes(whole)
    for path in files:
        path.rename(tmp_path / "away")
        with pytest.raises(CheckpointError, match=path.name):
            open_checkpoint(folder)
        (tmp_path / "away").rename(path)
    files[2].rename(tmp_path / "away")
    files[3].rename(files[2])
    (tmp_path / "away").rename(files[3])
    with pytest.raises(CheckpointError, match="rank_00000"):
        open_checkpoint(folder)


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the header of a rank's file, and the marker's digests with it; returns the file."""
    path = folder / "rank_00001.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    files = {p.name: StoredFile(bytes=p.stat().st_size, xxh3_128=digest_file(p)) for p in folder.glob("*.*")}
    (folder / "COMPLETE").write_bytes(to_json(Marker.of(files)))
    return path


def other_offsets(header: dict[str, Any]) -> None:
    next(iter(header.values()))["data_offsets"][1] += 1 << 40


def other_name(header: dict[str, Any]) -> None:
    header["x" + KEY] = header.pop(KEY)


def other_shape(header: dict[str, Any]) -> None:
    """One element, which would be spread over all of the fragment's."""
    header[KEY]["shape"] = [1, header[KEY]["shape"][0]]


def other_type(header: dict[str, Any]) -> None:
    header[KEY]["dtype"] = "I32"


KEY = "ffn.linear_fc1.weight/1-2/0/master"


@pytest.mark.parametrize("change", [other_offsets, other_name, other_shape, other_type])
def test_a_file_that_is_not_as_the_index_says_is_named(
    made: tuple[Path, Path], tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    data_folder, run = made[0], tmp_path / "run"
    shutil.copytree(made[1], run)
    path = forge(run / "checkpoints/step_00000004", change)
    with open_checkpoint(path.parent) as checkpoint, pytest.raises(CheckpointError, match=f"{path}: .*{KEY}"):
        checkpoint.tensor("ffn.linear_fc1.weight", "master")
    said = Job(2, settings(data_folder, run, 5), tmp_path / "log").run()
    assert f"{path}: " in said and "falling back to the checkpoint before" in said and "step_00000002 at step 2" in said


@pytest.mark.parametrize("name", ["COMPLETE", "index.json", "rank_00001.safetensors"])
def test_the_run_falls_back_and_names_the_file(made: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    data_folder, run = made[0], tmp_path / "run"
    shutil.copytree(made[1], run)
    path = run / "checkpoints/step_00000004" / name
    path.write_bytes(flip_bit(random.Random(name), path.read_bytes()))
    said = Job(2, settings(data_folder, run, 5), tmp_path / "log").run()
    assert f"{path}: damaged" in said and "falling back to the checkpoint before" in said
    assert "step_00000002 at step 2" in said
    assert (run / "checkpoints/step_00000004.broken" / name).exists()
    open_checkpoint(run / "checkpoints/step_00000004").close()


def test_a_pipe_in_a_files_place_is_not_waited_for(made: tuple[Path, Path], tmp_path: Path) -> None:
    data_folder, run = made[0], tmp_path / "run"
    shutil.copytree(made[1], run)
    path = run / "checkpoints/step_00000004/COMPLETE"
    path.unlink()
    os.mkfifo(path)
    said = Job(2, settings(data_folder, run, 5), tmp_path / "log").run(timeout=30)
    assert f"{path}: cannot be read (Is not a plain file)" in said and "step_00000002 at step 2" in said


def test_a_copy_under_a_later_name_is_no_later_step(made: tuple[Path, Path], tmp_path: Path) -> None:
    data_folder, run = made[0], tmp_path / "run"
    shutil.copytree(made[1], run)
    copy = run / "checkpoints/step_00000099"
    shutil.copytree(run / "checkpoints/step_00000002", copy)
    said = Job(2, settings(data_folder, run, 5), tmp_path / "log").run()
    assert f"{copy}: holds step 2, so it was renamed; falling back" in said and "at step 4, 32 samples" in said
    assert (run / "checkpoints/step_00000099.broken").is_dir()
    assert (run / "checkpoints/latest").read_text() == "step_00000005\n"


def test_without_a_good_one_the_run_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    data_folder, run = made[0], tmp_path / "run"
    shutil.copytree(made[1], run)
    for path in (run / "checkpoints").glob("step_*/index.json"):
        path.write_bytes(path.read_bytes()[:-1])
    job = Job(2, settings(data_folder, run, 5), tmp_path / "log")
    assert all(job.wait())
    assert "none of the 2 checkpoints is good" in job.log.read_text()
    assert len(list((run / "checkpoints").glob("step_????????"))) == 2


def test_a_checkpoint_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"step_00000030: there is no such checkpoint\n  remedy: name one that is"
    ):
        open_checkpoint(tmp_path / "step_00000030")
    (tmp_path / "step_00000040").mkdir()
    with pytest.raises(CheckpointError, match=r"step_00000040/COMPLETE: missing: this is no finished checkpoint"):
        open_checkpoint(tmp_path / "step_00000040")
