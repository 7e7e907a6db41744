"""`run`: tokenize, mix, index and verify from one YAML file; finished work of an earlier run is kept."""

from __future__ import annotations

import sys
from pathlib import Path

from data_tools.build_config import BuildConfig
from data_tools.dataset.format import DatasetManifest
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.index.index_segments import index, plan_dataset
from data_tools.index.verify import verify
from data_tools.pack.mix import MixOptions, mix
from data_tools.pack.tokenize_source import tokenize_source
from data_tools.sources.source_files import list_copies, refuse_shared


def run_all(config: BuildConfig, folder: Path, output: Path, *, workers: int, policy: ErrorPolicy) -> DatasetManifest:
    """Builds `output/indexed` from the raw text of `folder`, through `output/rows` (and `output/segments`).

    Raises:
        DataError: a source or the tokenizer is not where the configuration says, or two sources are one text; whatever
            a stage raises; the finished data set does not verify.
    """
    for name, path in (*config.sources.items(), ("tokenizer", config.tokenizer)):
        if not (folder / path).exists():
            raise DataError("not there", file=folder / path, place=name, remedy="set its place in the configuration")
    folders = {name: folder / path for name, path in config.sources.items()}
    refuse_shared(folders)
    for copy in list_copies(folders):
        print(copy, file=sys.stderr)
    there = sorted(path for path in (output / "rows").glob("*") if path.is_dir())
    for rows in there:  # mix takes every source that it finds
        if rows.name not in config.sources:
            raise DataError("no source of this configuration", file=rows, remedy="remove it, or use another --output")
    for name, path in config.sources.items():
        tokenize_source(
            name,
            folder / path,
            output / "rows",
            folder / config.tokenizer,
            row_length=config.row_length,
            workers=workers,
            policy=policy,
        )
    indexed, names = output / "indexed", config.source_names
    options = MixOptions(config.num_segments, config.direct, config.held_out_per_source, config.seed)
    mixed = mix(output / "rows", indexed if config.direct else output / "segments", options, None, names)
    if not isinstance(mixed, DatasetManifest):
        plan = plan_dataset(output / "segments", None, None, sources=names)
        mixed = index(output / "segments", indexed, plan, policy, threads=workers)
    assert isinstance(mixed, DatasetManifest)  # no part of the segments was asked for
    if faults := verify(indexed):
        raise DataError(f"{len(faults)} faults, the first: {faults[0]}", file=indexed, remedy="see verify's remedies")
    return mixed
