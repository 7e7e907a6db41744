"""`verify`: recomputes everything a data set's manifests claim from the bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools.dataset.format import (
    CHAT_TEMPLATE_NAME,
    HELD_OUT_NAME,
    MANIFEST_NAME,
    MARKS,
    TABLE_2_BILLION_TOKENS,
    TOKEN_DTYPE,
    DatasetManifest,
    SegmentManifest,
    index_blocks,
    marks_row_bytes,
    pack_marks,
    segment_name,
    unpack_marks,
)
from data_tools.dataset.segment_files import check_sizes, chosen_segments, source_counts
from data_tools.files.digest import digest_file, new_digest, sha256_file
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.files.json_file import canonical_json
from data_tools.files.progress import Progress
from data_tools.index.jsonl_segments import list_segments
from data_tools.index.row_blocks import FirstRows, row_blocks
from data_tools.index.segment_reader import SegmentReader
from data_tools.index.verify_images import row_faults, shard_faults

REMEDY = "remove the segment's .json and build the segment again"


def verify(folder: Path, segments: range | None = None, against: Path | None = None) -> list[str]:
    """Checks a data set; with `segments`, only those.

    Args:
        against: the JSONL segments that it was made from. A digest covers a whole file; where one differs, the rows
            are compared with these, and the first that is not the same is named.

    Returns:
        What is wrong, one line a fault, each with segment, row and byte; empty if all is well.
    """
    manifest = DatasetManifest.read(folder / MANIFEST_NAME)
    wanted = chosen_segments(segments, manifest.num_segments, folder)
    records = [(folder / segment_name(k), manifest.segments[k]) for k in wanted]
    if manifest.held_out is not None and segments is None:
        records.append((folder / HELD_OUT_NAME, manifest.held_out))
    sources = {}
    if against is not None:
        sources = {segment_name(k): path for k, path in list_segments(against, wanted)}
        sources[HELD_OUT_NAME] = against / f"{HELD_OUT_NAME}.jsonl"
    faults = list(_tokenizer_faults(folder, manifest))
    if manifest.images is not None and segments is None:
        faults += shard_faults(folder, manifest.images)
    with Progress("verify", sum(record.rows for _, record in records), "rows") as progress:
        for base, record in records:
            try:
                sound = len(faults)
                faults += segment_faults(base, record)
                if record.images_per_row:
                    faults += row_faults(base, record, manifest)
                if len(faults) > sound and base.name in sources and sources[base.name].is_file():
                    faults += _row_faults(base, sources[base.name], record)
            except DataError as error:
                faults.append(str(error))
            progress.advance(record.rows)
    return faults


def report(folder: Path, segments: range | None = None, against: Path | None = None) -> int:
    """`verify`, its faults on standard error; the exit code."""
    faults = verify(folder, segments, against)
    for fault in faults:
        print(fault, file=sys.stderr)
    if not faults:
        print(f"{folder}: all is as the manifest says")
    return 1 if faults else 0


def _tokenizer_faults(folder: Path, manifest: DatasetManifest) -> Iterator[str]:
    if manifest.tokenizer is not None:
        path = folder / manifest.tokenizer.file
        if not path.is_file() or sha256_file(path) != manifest.tokenizer.sha256:
            yield f"{path}: missing or not the tokenizer of the manifest"
    if manifest.chat is not None:
        path = folder / CHAT_TEMPLATE_NAME
        if not path.is_file() or sha256_file(path) != manifest.chat.template_sha256:
            yield f"{path}: missing or not the chat template of the manifest"


def segment_faults(base: Path, record: SegmentManifest) -> Iterator[str]:
    """What is wrong with one segment.

    Raises:
        DataError: a file is missing or has the wrong size, so that nothing else can be said.
    """
    own = base.with_suffix(".json")
    SegmentManifest.read(own)
    actual, expected = own.read_bytes(), canonical_json(record.to_json())
    if actual != expected:
        at = next(
            (i for i, pair in enumerate(zip(actual, expected, strict=False)) if pair[0] != pair[1]), len(expected)
        )
        yield (
            f"{own}: byte {at}: differs from the data set's manifest\n  remedy: {REMEDY}; if it was built again since,"
            " merge"
        )
    check_sizes(base, record)
    yield from _id_faults(base.with_suffix(".bin"), record)
    yield from _source_faults(base.with_suffix(".src"), record)
    yield from _index_faults(base.with_suffix(".idx"), record)
    if record.is_marked:
        yield from _mark_faults(base, record)


def _id_faults(path: Path, record: SegmentManifest) -> Iterator[str]:
    digest = new_digest()
    row_bytes = record.row_length * TOKEN_DTYPE.itemsize
    for start, (ids,) in row_blocks(record.rows, (path, record.row_length, TOKEN_DTYPE)):
        digest.update(ids.data)
        if ids.max() >= record.vocab_size:
            at_row, column = divmod(int(np.argmax(ids >= record.vocab_size)), record.row_length)
            row = start + at_row
            yield (
                f"{path}: row {row} id {column} byte {row * row_bytes + column * 2}: id {ids[at_row, column]} is not"
                f" below {record.vocab_size}\n  remedy: {REMEDY}"
            )
    yield from _digest_faults(path, record, digest)


def _row_faults(base: Path, source: Path, record: SegmentManifest) -> Iterator[str]:
    """The first row whose ids, and the first whose source, is not what the JSONL segment says."""
    policy = ErrorPolicy(quarantine=True, max_rejected=record.rejected)
    reader = SegmentReader(source, record.row_length, record.vocab_size, policy, record.sources)
    bin_path, src_path = base.with_suffix(".bin"), base.with_suffix(".src")
    row, faults = 0, {}
    with bin_path.open("rb") as ids, src_path.open("rb") as codes:
        for expected in reader.blocks():
            if bin_path not in faults and (found := _first_difference(ids, expected)):
                index, actual = found
                at_row, column = row + index // record.row_length, index % record.row_length
                at_byte = (at_row * record.row_length + column) * TOKEN_DTYPE.itemsize
                faults[bin_path] = (
                    f"row {at_row} id {column} byte {at_byte}: id {actual}, {source} says {expected[index]}"
                )
            expected = np.frombuffer(reader.codes[-1], dtype=np.uint8)
            if src_path not in faults and (found := _first_difference(codes, expected)):
                index, actual = found
                faults[src_path] = f"row {row + index} byte {row + index}: {actual}, {source} says {expected[index]}"
            row += len(expected)
    yield from (f"{path}: {fault}\n  remedy: {REMEDY}" for path, fault in faults.items())


def _first_difference(stream: BinaryIO, expected: np.ndarray) -> tuple[int, int] | None:
    """Reads as many values as `expected` has; where they begin to differ, the index and the value read there."""
    actual = np.frombuffer(stream.read(expected.nbytes), dtype=expected.dtype)
    differs = np.flatnonzero(actual != expected[: len(actual)])
    return (int(differs[0]), int(actual[differs[0]])) if len(differs) else None


def _source_faults(path: Path, record: SegmentManifest) -> Iterator[str]:
    codes = np.fromfile(path, dtype=np.uint8)
    known = len(record.sources)
    if codes.max() >= known:
        row = int(np.argmax(codes >= known))
        yield f"{path}: row {row} byte {row}: {codes[row]} is no source\n  remedy: {REMEDY}"
    elif (counts := source_counts(np.bincount(codes, minlength=known), record.sources)) != record.rows_per_source:
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


def _mark_faults(base: Path, record: SegmentManifest) -> Iterator[str]:
    """Rows begin with a conversation, something in each counts, and nothing does where a conversation begins."""
    paths = {suffix: base.with_suffix(f".{suffix}") for suffix in MARKS}
    digests = {suffix: new_digest() for suffix in MARKS}
    width, first = marks_row_bytes(record.row_length), FirstRows(REMEDY)
    for start, blocks in row_blocks(record.rows, *((path, width, np.dtype(np.uint8)) for path in paths.values())):
        stored = dict(zip(MARKS, blocks, strict=True))
        marks = {suffix: unpack_marks(block, record.row_length) for suffix, block in stored.items()}
        for suffix, block in stored.items():
            digests[suffix].update(block.data)
        first.note(
            start,
            *((paths[s], (pack_marks(marks[s]) != stored[s]).any(axis=1), "marks behind the row's end") for s in MARKS),
            (paths["starts"], ~marks["starts"][:, 0], "no conversation begins with its first id"),
            (paths["mask"], ~marks["mask"].any(axis=1), "no id counts"),
            (
                paths["mask"],
                (marks["mask"] & marks["starts"]).any(axis=1),
                "an id counts with which a conversation begins",
            ),
        )
    for suffix, path in paths.items():
        yield from _digest_faults(path, record, digests[suffix])
    yield from first.faults()


def _digest_faults(path: Path, record: SegmentManifest, digest: Any) -> Iterator[str]:
    expected = record.digests[path.suffix.removeprefix(".")]
    if digest.hexdigest() != expected:
        yield f"{path}: digest {digest.hexdigest()}, the manifest says {expected}\n  remedy: {REMEDY}"


def stats_table(folder: Path) -> str:
    """Totals per source, those of Amber against the paper's Table 2."""
    manifest = DatasetManifest.read(folder / MANIFEST_NAME)
    total = manifest.rows
    amber = sum(TABLE_2_BILLION_TOKENS.values())
    lines = [f"{'source':<14}{'rows':>14}{'tokens':>20}{'share %':>10}{'Table 2 %':>11}"]
    for name in manifest.sources:
        rows = manifest.rows_per_source.get(name, 0)
        paper = f"{100 * TABLE_2_BILLION_TOKENS[name] / amber:.2f}" if name in TABLE_2_BILLION_TOKENS else "-"
        lines.append(f"{name:<14}{rows:>14,}{rows * manifest.row_length:>20,}{100 * rows / total:>10.2f}{paper:>11}")
    lines.append(f"{'total':<14}{total:>14,}{total * manifest.row_length:>20,}{100:>10.2f}{100:>11.2f}")
    lines.append(
        f"{manifest.num_segments} segments of {manifest.rows_per_segment:,} rows of {manifest.row_length} ids;"
        f" held out: {manifest.held_out.rows if manifest.held_out else 0:,} rows;"
        f" dropped: {manifest.dropped_rows:,} rows; rejected: {manifest.rejected:,}"
    )
    return "\n".join(lines)
