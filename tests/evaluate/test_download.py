"""`eval --download` and hub names against a hub on the loopback: the real datasets and huggingface_hub do the work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_patch.evaluate.data import all_hub_data, loader, read_manifest
from megatron_patch.evaluate.suite import BENCHMARKS, BY_NAME
from tests.evaluate.hub import COMMIT, Downloaded, Hub
from tests.evaluate.small_data import rows

FEW = "piqa,winogrande,siqa"  # two large files each
PIQA = "baber/piqa/data/validation-00000-of-00001.parquet"


@pytest.fixture
def hub(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    with Hub(repositories) as hub:
        yield hub


def assert_is_the_hubs(folder: Path, benchmarks: str = ",".join(b.name for b in BENCHMARKS)) -> None:
    for task in (task for name in benchmarks.split(",") for task in BY_NAME[name].all_tasks):
        found = loader(folder, task)()  # compares the checksums
        assert {split: list(found[split]) for split in found} == {
            split: list(rows(task.data, split)) for split in task.data.splits
        }


def test_every_data_set_is_fetched_once_from_one_revision(downloaded: Downloaded) -> None:
    assert "cais/mmlu/virology/test: " in downloaded.errors
    assert f"{downloaded.folder}: complete, {len(all_hub_data())} data sets" in downloaded.errors
    assert_is_the_hubs(downloaded.folder)
    assert {record.revision for record in read_manifest(downloaded.folder).values()} == {COMMIT}
    assert sorted(downloaded.fetched) == sorted(
        f"{name.removeprefix('datasets/')}/{path}"
        for name, files in downloaded.hub.repositories.items() for path in files if path.endswith(".parquet")
    )  # fmt: skip


def test_killed_in_the_middle_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    arguments = ("--download", tmp_path / "data", "--benchmarks", FEW)
    hub.stop_after = 3
    process = hub.start(tmp_path / "home", "megatron_patch", "eval", *arguments)
    assert hub.stopped.wait(60)
    process.kill()
    process.communicate()
    kept = read_manifest(tmp_path / "data")
    assert 0 < len(kept) < 6
    before = {record.file: (tmp_path / "data" / record.file).stat().st_mtime_ns for record in kept.values()}

    hub.stop_after = None
    code, errors = hub.evaluate(tmp_path / "home", *arguments)
    assert code == 0, errors
    assert not any(f"{key}: " in errors for key in kept)
    assert {file: (tmp_path / "data" / file).stat().st_mtime_ns for file in before} == before
    assert sorted(set(hub.fetched)) == sorted(hub.fetched), "a whole file is not fetched again"
    assert len(hub.fetched) == 6
    assert_is_the_hubs(tmp_path / "data", FEW)


def test_a_cut_connection_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    hub.cut = [PIQA]
    code, errors = hub.evaluate(tmp_path / "home", "--download", tmp_path / "data", "--benchmarks=piqa")
    assert code == 0, errors
    assert hub.fetched.count(PIQA) == 2
    assert_is_the_hubs(tmp_path / "data", "piqa")


def test_damage_on_the_way_is_seen_and_mended(hub: Hub, tmp_path: Path) -> None:
    arguments = ("--download", tmp_path / "data", "--benchmarks=piqa")
    hub.damage = {PIQA}
    code, errors = hub.evaluate(tmp_path / "home", *arguments)
    assert code == 2
    assert "validation-00000-of-00001.parquet came with another digest than the hub's and was removed" in errors
    assert "run the same command again" in errors
    assert not read_manifest(tmp_path / "data")
    hub.damage.clear()
    code, errors = hub.evaluate(tmp_path / "home", *arguments)
    assert code == 0, errors
    assert_is_the_hubs(tmp_path / "data", "piqa")


@pytest.mark.parametrize("harm", ["removed", "changed"])
def test_what_was_lost_since_is_fetched_again(hub: Hub, tmp_path: Path, harm: str) -> None:
    arguments = ("--download", tmp_path / "data", "--benchmarks=piqa")
    assert hub.evaluate(tmp_path / "home", *arguments)[0] == 0
    file = tmp_path / "data" / read_manifest(tmp_path / "data")["baber/piqa/default/validation"].file
    if harm == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="eval --download"):
        assert_is_the_hubs(tmp_path / "data", "piqa")
    code, errors = hub.evaluate(tmp_path / "home", *arguments)
    assert (code, "piqa/default/validation" in errors, "piqa/default/train" in errors) == (0, True, False), errors
    assert_is_the_hubs(tmp_path / "data", "piqa")


def test_no_hub_and_no_such_data_set_are_said_in_words(hub: Hub, tmp_path: Path) -> None:
    del hub.files["datasets/baber/piqa"]
    code, errors = hub.evaluate(tmp_path / "home", "--download", tmp_path / "data", "--benchmarks=piqa")
    assert (code, "refused: baber/piqa: cannot be fetched" in errors, "Traceback" in errors) == (2, True, False), errors
    hub.__exit__(None, None, None)
    code, errors = hub.evaluate(tmp_path / "home", "--download", tmp_path / "data", "--benchmarks=siqa")
    assert (code, "refused: lighteval/siqa: cannot be fetched" in errors) == (2, True), errors
    assert ("Connection refused" in errors, "Traceback" in errors) == (True, False), errors
