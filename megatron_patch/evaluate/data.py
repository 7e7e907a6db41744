"""The benchmarks' data sets in a local folder: fetched once where there is a network, read with checksums elsewhere.

FOLDER/Rowan--hellaswag/default/train.parquet     one file a split, columns as on the hub
FOLDER/manifest.json                              path, configuration, split -> rows, SHA-256, hub revision
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import HfApi, HfFileSystem, RepoFile, hf_hub_download
from huggingface_hub.hf_file_system import HfFileSystemResolvedRepositoryPath

from data_tools.files.bounded_json import load_bounded
from data_tools.files.digest import sha256_file
from data_tools.files.durable import folder_lock, write_beside, write_whole
from data_tools.files.json_file import canonical_json
from megatron_patch.evaluate.suite import BENCHMARKS, Benchmark, HubData, Task

MANIFEST_NAME = "manifest.json"
IMAGE = "image"
"""The column of images, in questions and in data sets of images alone."""


class EvaluationError(ValueError):
    """An evaluation that cannot go on: names the file or model, what was expected and what to do."""


@dataclass(frozen=True)
class SplitRecord:
    """One split as it was fetched."""

    file: str
    rows: int
    sha256: str
    revision: str
    """Commit of the hub's repository."""


def split_key(data: HubData, split: str) -> str:
    return f"{data.path}/{data.config or 'default'}/{split}"


def read_manifest(folder: Path) -> dict[str, SplitRecord]:
    """Every split that the folder holds, by `split_key`; empty where there is no manifest.

    Raises:
        EvaluationError: the manifest is damaged.
    """
    file = folder / MANIFEST_NAME
    if not file.is_file():
        return {}
    try:
        return {key: SplitRecord(**record) for key, record in load_bounded(file).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise EvaluationError(f"{file}: damaged ({error}); {_how_to_fetch(folder)}") from None


def store(folder: Path, data: HubData, splits: Mapping[str, datasets.Dataset], revision: str) -> None:
    """Writes splits of a data set, then enters them in the manifest."""
    manifest = read_manifest(folder)
    for split, rows in splits.items():
        file = folder / data.path.replace("/", "--") / (data.config or "default") / f"{split}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        with write_beside(file) as stream:
            rows.to_parquet(stream)
        where = file.relative_to(folder).as_posix()
        manifest[split_key(data, split)] = SplitRecord(where, len(rows), sha256_file(file), revision)
    write_whole(folder / MANIFEST_NAME, canonical_json({key: asdict(record) for key, record in manifest.items()}))


def download(folder: Path, wanted: Sequence[HubData]) -> None:
    """Fetches from the hub every split that is not there as it was fetched; what is there is not fetched again.

    All splits of a data set come from one revision: the one that the manifest names, or else the hub's newest.

    Raises:
        EvaluationError: the hub cannot be reached, has no such data set, or a file is not what the hub says.
        DataError: another process fills the folder, or the disk is full.
    """
    with folder_lock(folder):
        for number, data in enumerate(wanted, 1):
            have = read_manifest(folder)
            missing = [split for split in data.splits if not _is_there(folder, have.get(split_key(data, split)))]
            if not missing:
                continue
            try:
                revision = _revision(have, data) or HfApi().dataset_info(data.path).sha or "main"
                found = _fetch(data, revision)
            except (OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:
                raise EvaluationError(
                    f"{data.path}: cannot be fetched ({_first_line(error)}); run the same command again, what is there "
                    "is kept, or run it where the hub can be reached and copy the folder here"
                ) from error
            store(folder, data, {split: found[split] for split in missing}, revision)
            for split in missing:
                rows = f"{len(found[split]):,} rows"
                print(f"{split_key(data, split)}: {rows} ({number}/{len(wanted)})", file=sys.stderr)
    print(f"{folder}: complete, {len(wanted)} data sets with their SHA-256 in {MANIFEST_NAME}", file=sys.stderr)


def _is_there(folder: Path, record: SplitRecord | None) -> bool:
    return record is not None and (folder / record.file).is_file() and _digest(folder / record.file) == record.sha256


def _revision(manifest: dict[str, SplitRecord], data: HubData) -> str | None:
    return next((record.revision for key, record in manifest.items() if key.startswith(f"{data.path}/")), None)


def _fetch(data: HubData, revision: str) -> datasets.DatasetDict:
    """All splits of a data set; each file is compared with the hub's digest before anything reads it."""
    datasets.disable_progress_bars()  # of the conversion; those of the transfer stay
    builder = datasets.load_dataset_builder(data.path, data.config, revision=revision)
    for url in (url for urls in builder.config.data_files.values() for url in urls):
        place = HfFileSystem().resolve_path(url)
        assert isinstance(place, HfFileSystemResolvedRepositoryPath)  # data sets lie in repositories, not in buckets
        (repo, path, at) = (place.repo_id, place.path_in_repo, place.revision)
        (info,) = HfApi().get_paths_info(repo, path, repo_type="dataset", revision=at)
        file = Path(hf_hub_download(repo, path, repo_type="dataset", revision=at)).resolve()
        if not (isinstance(info, RepoFile) and _is_the_hubs(file, info)):
            file.unlink()
            raise EvaluationError(f"{path} came with another digest than the hub's and was removed")
    builder.download_and_prepare()
    return builder.as_dataset()


def _digest(file: Path) -> str:
    status = file.stat()
    return _digest_as_of(file, status.st_size, status.st_mtime_ns)


@cache
def _digest_as_of(file: Path, size: int, mtime_ns: int) -> str:
    """SHA-256; a sweep asks for it at every milestone."""
    return str(sha256_file(file))


def _is_the_hubs(file: Path, info: RepoFile) -> bool:
    if info.lfs is not None:
        return sha256_file(file) == info.lfs.sha256
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == info.blob_id  # as git names a file


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def all_hub_data(benchmarks: Iterable[Benchmark] = BENCHMARKS) -> list[HubData]:
    """Every data set that the benchmarks read, once."""
    return list(dict.fromkeys(data for b in benchmarks for task in b.all_tasks for data in task.all_data))


def loader(folder: Path, task: Task) -> Callable[..., dict[str, datasets.Dataset]]:
    """A function that reads the splits of a task's data, as the harness asks for (it passes the task's metadata).

    The images of questions stay where they are: the column `image` says which one it is, for `StoredImages`.

    Raises (at once, not when called):
        EvaluationError: a split is missing or is not what was fetched; the message has the command that fetches it.
    """
    for data in task.all_data:
        _check(folder, data)
    manifest = read_manifest(folder)

    def load(**_: Any) -> dict[str, datasets.Dataset]:
        return {
            split: datasets.Dataset(_questions(folder, manifest, split_key(task.data, split), task.images))
            for split in task.data.splits
        }

    return load


def _check(folder: Path, data: HubData) -> None:
    manifest = read_manifest(folder)
    for split in data.splits:
        record = manifest.get(split_key(data, split))
        if record is None or not (folder / record.file).is_file():
            raise EvaluationError(f"{folder}: data set {split_key(data, split)} is missing; {_how_to_fetch(folder)}")
        if _digest(folder / record.file) != record.sha256:
            (where, expected) = (folder / record.file, record.sha256[:12])
            raise EvaluationError(f"{where}: its SHA-256 is not {expected}...; {_how_to_fetch(folder)}")


def _questions(folder: Path, manifest: dict[str, SplitRecord], key: str, images: HubData | None) -> pa.Table:
    """A split's table; `IMAGE` holds names of images in place of the images."""
    file = folder / manifest[key].file
    columns = pq.read_schema(file).names
    if images is None and IMAGE not in columns:
        return pq.read_table(file)
    # Without the schema's own metadata, which has a type for the column of images.
    table = pq.read_table(file, columns=[c for c in columns if c != IMAGE]).replace_schema_metadata(None)
    if images is None:
        names = [f"{key}#{row}" for row in range(len(table))]
    else:
        key = split_key(images, images.splits[0])
        ids = pq.read_table(folder / manifest[key].file, columns=["id"])["id"].to_pylist()
        rows = {identifier: row for row, identifier in enumerate(ids)}
        asked = table["imageId"].to_pylist()
        if missing := next((identifier for identifier in asked if identifier not in rows), None):
            raise EvaluationError(f"{file}: no image {missing} in {folder / manifest[key].file}")
        names = [f"{key}#{rows[identifier]}" for identifier in asked]
    return table.append_column(IMAGE, pa.array(names))


class StoredImages:
    """The images of the data sets in a folder, by the names that `loader` gives them, as the bytes of their files."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._manifest = folder, read_manifest(folder)
        self._files: dict[str, pq.ParquetFile] = {}
        self._group: tuple[str, int] | None = None
        self._images: list[dict[str, Any] | None] = []  # of that group: questions come in the order of their rows

    def read(self, name: str) -> bytes:
        """Raises EvaluationError where the row has no image."""
        key, _, row = name.rpartition("#")
        if key not in self._files:
            self._files[key] = pq.ParquetFile(self._folder / self._manifest[key].file)
        parquet, group, left = self._files[key], 0, int(row)
        while left >= (rows := parquet.metadata.row_group(group).num_rows):
            group, left = group + 1, left - rows
        if self._group != (key, group):
            self._images = parquet.read_row_group(group, columns=[IMAGE])[IMAGE].to_pylist()
            self._group = key, group
        found = self._images[left]
        if not found or not found["bytes"]:
            raise EvaluationError(f"{self._folder}: {key} row {row} has no image; {_how_to_fetch(self._folder)}")
        return bytes(found["bytes"])


def data_digests(folder: Path, task: Task) -> dict[str, str]:
    """SHA-256 of each split that a task reads and the folder holds."""
    manifest = read_manifest(folder)
    keys = [split_key(data, split) for data in task.all_data for split in data.splits]
    return {key: manifest[key].sha256 for key in keys if key in manifest}


def _how_to_fetch(folder: Path) -> str:
    return f"fetch it with `python -m megatron_patch eval --download {folder}`"
