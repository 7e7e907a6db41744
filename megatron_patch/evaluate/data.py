"""The benchmarks' data sets in a local folder: fetched once where there is a network, read with checksums elsewhere.

FOLDER/Rowan--hellaswag/default/train.parquet     one file a split, columns as on the hub
FOLDER/manifest.json                              path, configuration, split -> rows, SHA-256, hub revision
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from huggingface_hub import HfApi

from data_tools.durable import partial_path, publish, write_whole
from data_tools.format import canonical_json, sha256_file
from megatron_patch.evaluate.suite import BENCHMARKS, HubData

MANIFEST_NAME = "manifest.json"


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
        return {key: SplitRecord(**record) for key, record in json.loads(file.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise EvaluationError(f"{file}: damaged ({error}); {_fetch(folder)}") from None


def store(folder: Path, data: HubData, split: str, rows: datasets.Dataset, revision: str) -> None:
    """Writes one split and enters it in the manifest."""
    file = folder / data.path.replace("/", "--") / (data.config or "default") / f"{split}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(partial_path(file))
    publish(file)
    record = SplitRecord(file.relative_to(folder).as_posix(), len(rows), sha256_file(file), revision)
    manifest = {**read_manifest(folder), split_key(data, split): record}
    write_whole(folder / MANIFEST_NAME, canonical_json({key: asdict(record) for key, record in manifest.items()}))


def download(folder: Path, wanted: Iterable[HubData]) -> None:
    """Fetches from the hub every split that is not already there; what is there is not fetched again.

    Raises:
        EvaluationError: the hub cannot be reached or has no such data set.
    """
    api = HfApi()
    folder.mkdir(parents=True, exist_ok=True)
    for data in dict.fromkeys(wanted):
        have = read_manifest(folder)
        missing = [split for split in data.splits if split_key(data, split) not in have]
        if not missing:
            continue
        try:
            revision = api.dataset_info(data.path).sha or "unknown"
            for split in missing:
                rows = datasets.load_dataset(data.path, data.config, split=split, revision=revision)
                store(folder, data, split, rows, revision)
                print(f"{split_key(data, split)}: {len(rows):,} rows", file=sys.stderr)
        except (OSError, ValueError, RuntimeError) as error:
            raise EvaluationError(
                f"{data.path}: cannot be fetched ({str(error).splitlines()[0]}); run `python -m megatron_patch eval "
                f"--download {folder}` where the hub can be reached, and copy the folder here"
            ) from error


def all_hub_data() -> list[HubData]:
    """Every data set of the suite, once."""
    return list(dict.fromkeys(task.data for benchmark in BENCHMARKS for task in benchmark.all_tasks))


def loader(folder: Path, data: HubData) -> Callable[..., dict[str, datasets.Dataset]]:
    """A function that reads the splits of `data`, as the harness asks for (it passes a task's metadata).

    Raises (at once, not when called):
        EvaluationError: a split is missing or is not what was fetched; the message has the command that fetches it.
    """
    manifest = read_manifest(folder)
    for split in data.splits:
        record = manifest.get(split_key(data, split))
        if record is None or not (folder / record.file).is_file():
            raise EvaluationError(f"{folder}: data set {split_key(data, split)} is missing; {_fetch(folder)}")
        if sha256_file(folder / record.file) != record.sha256:
            (where, expected) = (folder / record.file, record.sha256[:12])
            raise EvaluationError(f"{where}: its SHA-256 is not {expected}...; remove it, then {_fetch(folder)}")

    def load(**_: Any) -> dict[str, datasets.Dataset]:
        return {
            split: datasets.Dataset(pq.read_table(folder / manifest[split_key(data, split)].file))
            for split in data.splits
        }

    return load


def data_digests(folder: Path, data: HubData) -> dict[str, str]:
    """SHA-256 of each split of `data` that the folder holds."""
    manifest = read_manifest(folder)
    keys = [split_key(data, split) for split in data.splits]
    return {key: manifest[key].sha256 for key in keys if key in manifest}


def _fetch(folder: Path) -> str:
    return f"fetch it with `python -m megatron_patch eval --download {folder}`"
