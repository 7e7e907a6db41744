"""`verify`: recomputes everything a data set's manifests claim from the bytes."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.format import (
    HELD_OUT_NAME,
    MANIFEST_NAME,
    SOURCES,
    TABLE_2_BILLION_TOKENS,
    TOKEN_DTYPE,
    DataError,
    DatasetManifest,
    SegmentManifest,
    digest_file,
    index_blocks,
    new_digest,
    segment_name,
    sha256_file,
)
from data_tools.jsonl_segments import list_segments
from data_tools.progress import Progress
from data_tools.segment_files import check_sizes, source_counts
from data_tools.segment_reader import ErrorPolicy, SegmentReader

BLOCK_ROWS = 1024
REMEDY = "remove the segment's .json and build the segment again"


def verify(folder: Path, segments: range | None = None, against: Path | None = None) -> list[str]:
    """Checks a data set; with `segments`, only those.

    Args:
        against: the JSONL segments that it was made from. A digest speaks of a whole file; where one differs, the rows
            are compared with these, and the first that is not the same is named.

    Returns:
        What is wrong, one line a fault, each with segment, row and byte; empty if all is well.
    """
    manifest = DatasetManifest.read(folder / MANIFEST_NAME)
    wanted = segments or range(manifest.num_segments)
    records = [(folder / segment_name(k), manifest.segments[k]) for k in wanted]
    if manifest.held_out is not None and segments is None:
        records.append((folder / HELD_OUT_NAME, manifest.held_out))
    sources = {segment_name(k): path for k, path in list_segments(against)} if against is not None else {}
    faults = list(_tokenizer_faults(folder, manifest))
    with Progress("verify", sum(record.rows for _, record in records), "rows") as progress:
        for base, record in records:
            try:
                sound = len(faults)
                faults += segment_faults(base, record)
                if len(faults) > sound and base.name in sources:
                    faults += _row_faults(base.with_suffix(".bin"), sources[base.name], record)
            except DataError as error:
                faults.append(str(error))
            progress.advance(record.rows)
    return faults


def _tokenizer_faults(folder: Path, manifest: DatasetManifest) -> Iterator[str]:
    if manifest.tokenizer is not None:
        path = folder / manifest.tokenizer.file
        if not path.is_file() or sha256_file(path) != manifest.tokenizer.sha256:
            yield f"{path}: missing or not the tokenizer of the manifest"


def segment_faults(base: Path, record: SegmentManifest) -> Iterator[str]:
    """What is wrong with one segment.

    Raises:
        DataError: a file is missing or has the wrong size, so that nothing else can be said.
    """
    own = SegmentManifest.read(base.with_suffix(".json"))
    if own != record:
        yield f"{base.with_suffix('.json')}: differs from the data set's manifest\n  remedy: merge again"
    check_sizes(base, record)
    yield from _id_faults(base.with_suffix(".bin"), record)
    yield from _source_faults(base.with_suffix(".src"), record)
    yield from _index_faults(base.with_suffix(".idx"), record)


def _id_faults(path: Path, record: SegmentManifest) -> Iterator[str]:
    digest = new_digest()
    row_bytes = record.row_length * TOKEN_DTYPE.itemsize
    with path.open("rb", buffering=0) as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        for start in range(0, record.rows, BLOCK_ROWS):
            block = mapped[start * row_bytes : (start + BLOCK_ROWS) * row_bytes]
            digest.update(block)
            ids = np.frombuffer(block, dtype=TOKEN_DTYPE)
            if ids.max() >= record.vocab_size:
                at = int(np.argmax(ids >= record.vocab_size))
                row, column = start + at // record.row_length, at % record.row_length
                yield (
                    f"{path}: row {row} id {column} byte {row * row_bytes + column * 2}: id {ids[at]} is not below"
                    f" {record.vocab_size}\n  remedy: {REMEDY}"
                )
    yield from _digest_faults(path, record, digest)


def _row_faults(path: Path, source: Path, record: SegmentManifest) -> Iterator[str]:
    """The first row of a `.bin` that is not what its JSONL segment says."""
    reader = SegmentReader(source, record.row_length, record.vocab_size, ErrorPolicy(True, record.rejected))
    row_bytes = record.row_length * TOKEN_DTYPE.itemsize
    at = 0
    with path.open("rb") as stream:
        for expected in reader.blocks():
            actual = np.frombuffer(stream.read(expected.nbytes), dtype=TOKEN_DTYPE)
            differs = actual != expected[: len(actual)]
            if differs.any():
                index = int(np.argmax(differs))
                row, column = at + index // record.row_length, index % record.row_length
                yield (
                    f"{path}: row {row} id {column} byte {row * row_bytes + column * TOKEN_DTYPE.itemsize}:"
                    f" id {actual[index]}, {source} says {expected[index]}\n  remedy: {REMEDY}"
                )
                return
            at += len(expected) // record.row_length


def _source_faults(path: Path, record: SegmentManifest) -> Iterator[str]:
    codes = np.fromfile(path, dtype=np.uint8)
    if codes.max() >= len(SOURCES):
        row = int(np.argmax(codes >= len(SOURCES)))
        yield f"{path}: row {row} byte {row}: {codes[row]} is no source\n  remedy: {REMEDY}"
    elif (counts := source_counts(np.bincount(codes, minlength=len(SOURCES)))) != record.rows_per_source:
        yield f"{path}: rows per source {counts}, the manifest says {record.rows_per_source}\n  remedy: {REMEDY}"
    digest = new_digest()
    digest.update(codes.data)
    yield from _digest_faults(path, record, digest)


def _index_faults(path: Path, record: SegmentManifest) -> Iterator[str]:
    at = 0
    with path.open("rb") as stream:
        for expected in index_blocks(record.rows, record.row_length):
            actual = stream.read(len(expected))
            if actual != expected:
                differs = np.frombuffer(actual, np.uint8) != np.frombuffer(expected, np.uint8)
                yield f"{path}: byte {at + int(np.argmax(differs))}: not the index of its rows\n  remedy: {REMEDY}"
                return
            at += len(expected)
    if digest_file(path) != record.digests["idx"]:
        yield f"{path}: the manifest's digest is not that of this file\n  remedy: {REMEDY}"


def _digest_faults(path: Path, record: SegmentManifest, digest: Any) -> Iterator[str]:
    expected = record.digests[path.suffix.removeprefix(".")]
    if digest.hexdigest() != expected:
        yield f"{path}: digest {digest.hexdigest()}, the manifest says {expected}\n  remedy: {REMEDY}"


def stats_table(folder: Path) -> str:
    """Totals per source against the paper's Table 2."""
    manifest = DatasetManifest.read(folder / MANIFEST_NAME)
    total = manifest.rows
    amber = sum(TABLE_2_BILLION_TOKENS.values())
    lines = [f"{'source':<14}{'rows':>14}{'tokens':>20}{'share %':>10}{'Table 2 %':>11}"]
    for name in SOURCES:
        rows = manifest.rows_per_source.get(name, 0)
        paper = 100 * TABLE_2_BILLION_TOKENS[name] / amber
        lines.append(f"{name:<14}{rows:>14,}{rows * manifest.row_length:>20,}{100 * rows / total:>10.2f}{paper:>11.2f}")
    lines.append(f"{'total':<14}{total:>14,}{total * manifest.row_length:>20,}{100:>10.2f}{100:>11.2f}")
    lines.append(
        f"{manifest.num_segments} segments of {manifest.rows_per_segment:,} rows of {manifest.row_length} ids;"
        f" held out: {manifest.held_out.rows if manifest.held_out else 0:,} rows;"
        f" dropped: {manifest.dropped_rows:,} rows; rejected: {manifest.rejected:,}"
    )
    return "\n".join(lines)
