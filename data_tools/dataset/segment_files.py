"""One segment's files beside its `.bin`, and the data set's manifest over all segments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.dataset.format import (
    AMBER_SOURCES,
    HELD_OUT_NAME,
    MANIFEST_NAME,
    ChatRecord,
    DatasetManifest,
    SegmentManifest,
    TokenizerRecord,
    check_same_sources,
    index_blocks,
    segment_name,
    tokenizer_in,
    tokenizer_name,
    total_per_source,
)
from data_tools.dataset.images import ImagesRecord
from data_tools.files.digest import new_digest
from data_tools.files.durable import LOCK_NAME, folder_lock, write_beside, write_whole
from data_tools.files.errors import DataError
from data_tools.files.json_file import canonical_json
from data_tools.files.plain_file import file_size


@dataclass(frozen=True)
class DatasetPlan:
    """What is known of a data set before its segments are built."""

    num_segments: int
    row_length: int
    vocab_size: int
    tokenizer: TokenizerRecord | None
    dropped_rows: int = 0
    rejected: int = 0
    """Bad documents and rows set aside before the segments."""
    has_held_out: bool = False
    sources: tuple[str, ...] = AMBER_SOURCES
    """In their order: a byte of a segment's `.src` is a position in it."""
    chat: ChatRecord | None = None
    images: ImagesRecord | None = None

    def segment(
        self,
        name: str,
        rows: int,
        counts: Sequence[int] | np.ndarray,
        rejected: int,
        source: dict[str, Any],
        digests: dict[str, str],
    ) -> SegmentManifest:
        """The manifest of one of its segments, `counts` being rows by source code."""
        return SegmentManifest(
            name=name,
            rows=rows,
            row_length=self.row_length,
            vocab_size=self.vocab_size,
            rows_per_source=source_counts(counts, self.sources),
            rejected=rejected,
            input=source,
            digests=digests,
            sources=self.sources,
            images_per_row=self.images.per_row if self.images else 0,
        )


def chosen_segments(segments: range | None, num_segments: int, folder: Path) -> range:
    """`segments`, or all of them.

    Raises:
        DataError: there are not so many.
    """
    if segments is not None and segments.stop > num_segments:
        raise DataError(
            f"no segment {segments.stop - 1}: there are {num_segments}", file=folder, remedy="check --segment"
        )
    return range(num_segments) if segments is None else segments


@contextlib.contextmanager
def segments_lock(folder: Path, segments: range | None) -> Iterator[None]:
    """Holds a folder, or, for a task of a Slurm array, the segments that it builds there.

    Raises:
        FolderBusy: another process holds the folder or one of the segments.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(folder_lock(folder, shared=segments is not None))
        for segment in segments or ():
            held.enter_context(folder_lock(folder, f"{LOCK_NAME}.{segment_name(segment)}"))
        yield


def write_companions(
    base: Path,
    codes: Iterable[bytes],
    rows: int,
    plan: DatasetPlan,
    rejected: int,
    source: dict[str, Any],
    bin_digest: str,
    marks: Mapping[str, Iterable[bytes]] | None = None,
) -> SegmentManifest:
    """Writes `.src`, `.idx`, any marks and images and, last, the manifest of the segment whose `.bin` is in place.

    Args:
        base: the segment's path without suffix.
        codes: source codes of the rows, in blocks.
        source: what the segment was made from, for the manifest.
        bin_digest: XXH3-128 of the `.bin`.
        marks: the bytes of the files of marks by suffix, all of `MARKS`, and of images where there are some, in blocks.
    """
    counts = np.zeros(len(plan.sources), dtype=np.int64)
    digests = {"bin": bin_digest}
    for suffix, blocks in {"src": codes, "idx": index_blocks(rows, plan.row_length), **(marks or {})}.items():
        digest = new_digest()
        with write_beside(base.with_suffix(f".{suffix}")) as stream:
            for block in blocks:
                stream.write(block)
                digest.update(block)
                if suffix == "src":
                    counts += np.bincount(np.frombuffer(block, dtype=np.uint8), minlength=len(plan.sources))
        digests[suffix] = digest.hexdigest()
    manifest = plan.segment(base.name, rows, counts, rejected, source, digests)
    write_whole(base.with_suffix(".json"), canonical_json(manifest.to_json()))
    return manifest


def source_counts(counts: Sequence[int] | np.ndarray, sources: tuple[str, ...]) -> dict[str, int]:
    """Counts by source code as counts by name; sources without rows are left out."""
    return {name: int(count) for name, count in zip(sources, counts, strict=True) if count}


def finished_segment(base: Path, plan: DatasetPlan, source: dict[str, Any]) -> SegmentManifest | None:
    """The manifest of a segment that an earlier run finished; None where there is none.

    Raises:
        DataError: it was made from other input or with other settings, or a file has the wrong size.
    """
    path = base.with_suffix(".json")
    if not path.is_file():
        return None
    manifest = SegmentManifest.read(path)
    asked = {**source, "row_length": plan.row_length, "vocab_size": plan.vocab_size}
    made = {name: manifest.input.get(name) for name in source}
    made |= {"row_length": manifest.row_length, "vocab_size": manifest.vocab_size}
    if unlike := [f"{name} was {made[name]!r}, now {asked[name]!r}" for name in asked if made[name] != asked[name]]:
        raise DataError(
            f"made from other input or with other settings: {'; '.join(unlike)}",
            file=path,
            remedy="give every command the options that it was built with, use another --output, or remove "
            f"{base.name}.* to build it again",
        )
    check_same_sources(manifest, plan.sources, path)
    check_sizes(base, manifest)
    return manifest


def check_sizes(base: Path, manifest: SegmentManifest) -> None:
    """Raises DataError where a file of the segment is missing or has another size than its manifest implies."""
    for suffix, size in manifest.sizes().items():
        path = base.with_suffix(f".{suffix}")
        if (actual := file_size(path)) != size:
            raise DataError(
                f"{actual} bytes, but {manifest.rows} rows of {manifest.row_length} ids need {size}",
                file=path,
                place="size",
                remedy=f"the file was cut short or replaced: remove {base.name}.json and build the segment again",
            )


def write_dataset_manifest(folder: Path, plan: DatasetPlan) -> DatasetManifest:
    """Reads the manifests of all segments and writes the data set's.

    Raises:
        DataError: segments are missing (all are named), there is one more, or they differ in their number of rows.
    """
    bases = [folder / segment_name(k) for k in range(plan.num_segments)]
    if plan.has_held_out:
        bases.append(folder / HELD_OUT_NAME)
    missing = [base.name for base in bases if not base.with_suffix(".json").is_file()]
    if missing:
        numbers = ",".join(
            name.removeprefix("segment_").lstrip("0") or "0" for name in missing if name != HELD_OUT_NAME
        )
        raise DataError(
            f"{len(missing)} of {len(bases)} are missing: {', '.join(missing)}",
            file=folder,
            remedy=f"build them, for example with sbatch --array={numbers}, then merge again",
        )
    if extra := {path.stem for path in folder.glob("segment_*.json")} - {base.name for base in bases}:
        raise DataError(
            f"{min(extra)} is there, but the data set has {plan.num_segments} segments",
            file=folder,
            remedy="bring the input that is missing, or remove the files of the segments that are too many",
        )
    manifests = []
    for base in bases:
        manifest = SegmentManifest.read(base.with_suffix(".json"))
        check_sizes(base, manifest)
        if (manifest.row_length, manifest.vocab_size) != (plan.row_length, plan.vocab_size):
            raise DataError(
                f"row length {manifest.row_length} and vocabulary {manifest.vocab_size},"
                f" not {plan.row_length} and {plan.vocab_size}",
                file=base.with_suffix(".json"),
                remedy="build the segment again with the data set's settings",
            )
        check_same_sources(manifest, plan.sources, base.with_suffix(".json"))
        manifests.append(manifest)
    segments, held_out = manifests[: plan.num_segments], manifests[plan.num_segments :]
    rows = segments[0].rows
    for segment in segments:
        if segment.rows != rows:
            raise DataError(
                f"{segment.rows} rows, but {segments[0].name} has {rows}",
                file=folder / f"{segment.name}.json",
                remedy="all segments must have the same number of rows: look for a short or rejected input",
            )
    dataset = DatasetManifest(
        num_segments=plan.num_segments,
        rows_per_segment=rows,
        row_length=plan.row_length,
        vocab_size=plan.vocab_size,
        rows_per_source=total_per_source(segments, plan.sources),
        dropped_rows=plan.dropped_rows,
        rejected=plan.rejected + sum(segment.rejected for segment in segments),
        tokenizer=plan.tokenizer,
        segments=segments,
        held_out=held_out[0] if held_out else None,
        sources=plan.sources,
        chat=plan.chat,
        images=plan.images,
    )
    with folder_lock(folder, f"{LOCK_NAME}.manifest", wait=True):  # two merges at once write the same
        write_whole(folder / MANIFEST_NAME, canonical_json(dataset.to_json()))
    return dataset


def tokenizer_lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Held by whoever puts a tokenizer into `folder`; others wait, for a moment."""
    return folder_lock(folder, f"{LOCK_NAME}.tokenizer", wait=True)


def keep_tokenizer(tokenizer: Path | None, folder: Path) -> None:
    """Puts a copy of a tokenizer, where there is one, into `folder`; several processes may do so at once.

    Raises:
        DataError: the folder holds another one: what is in it was made with that.
    """
    if tokenizer is None:
        return
    content = tokenizer.read_bytes()
    target = folder / tokenizer_name(tokenizer)
    with tokenizer_lock(folder):
        there = tokenizer_in(folder)
        if there is None:
            write_whole(target, content)
        elif there != target or there.read_bytes() != content:
            raise DataError(
                f"not the tokenizer {tokenizer}",
                file=there,
                remedy="use the same tokenizer as before, or another --output",
            )
