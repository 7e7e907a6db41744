"""`index`: JSONL segments -> `.bin`, `.idx`, `.src`, each row checked."""

from __future__ import annotations

import contextlib
import operator
from pathlib import Path
from typing import Any

from data_tools.dataset.format import (
    AMBER_SOURCES,
    HELD_OUT_NAME,
    MANIFEST_NAME,
    ROW_LENGTH,
    VOCAB_SIZE,
    DatasetManifest,
    TokenizerRecord,
    checked_sources,
    segment_name,
    tokenizer_in,
)
from data_tools.dataset.segment_files import (
    DatasetPlan,
    chosen_segments,
    finished_segment,
    keep_tokenizer,
    segments_lock,
    write_companions,
    write_dataset_manifest,
)
from data_tools.files.digest import digest_stream, new_digest, sha256_file
from data_tools.files.durable import errors_named, reserve, touched_since, unchanged, write_beside, write_whole
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.files.json_file import fields_named, read_json
from data_tools.files.plain_file import file_size
from data_tools.files.progress import Progress
from data_tools.index.jsonl_segments import MIX_MANIFEST, list_segments
from data_tools.index.segment_reader import SegmentReader
from data_tools.sources.compressed import open_decompressed, unpacking_named


def plan_dataset(
    folder: Path,
    row_length: int | None,
    vocab_size: int | None,
    segments: range | None = None,
    num_segments: int | None = None,
    sources: tuple[str, ...] | None = None,
) -> DatasetPlan:
    """What `mix.json` says of a folder of JSONL segments, or, without one, what its files and the arguments say.

    Args:
        segments: the only ones that must be there; without `mix.json`, the plan then knows of none beyond them.
        num_segments: how many there must be.
        sources: their list; without `mix.json` and without this, Amber's.

    Raises:
        DataError: segments are missing or too many, or arguments contradict `mix.json` or the tokenizer in the folder.
    """
    count = len(list(list_segments(folder, segments, num_segments or 0)))
    path = folder / MIX_MANIFEST
    if path.is_file():
        value = read_json(path, "mix again")
        with fields_named(path, "mix again"):
            plan = DatasetPlan(
                num_segments=operator.index(value["num_segments"]),
                row_length=operator.index(value["row_length"]),
                vocab_size=operator.index(value["vocab_size"]),
                tokenizer=TokenizerRecord(**value["tokenizer"]),
                dropped_rows=operator.index(value["dropped_rows"]),
                rejected=operator.index(value["rejected"]),
                has_held_out=value["has_held_out"],
                sources=checked_sources(value.get("sources", AMBER_SOURCES), path),
            )
        if segments is None and count != plan.num_segments:
            raise DataError(
                f"lists {plan.num_segments} segments, the folder has {count}",
                file=path,
                remedy="remove what is not of this mix, or mix again",
            )
        given_values = {"row_length": row_length, "vocab_size": vocab_size, "num_segments": num_segments}
        for name, given in given_values.items():
            if given is not None and given != getattr(plan, name):
                option = f"--{name.replace('_', '-')}"
                raise DataError(f"{name} is {getattr(plan, name)}, not {given}", file=path, remedy=f"omit {option}")
        if sources is not None and sources != plan.sources:
            raise DataError(
                f"the sources are {', '.join(plan.sources)}, not {', '.join(sources)}",
                file=path,
                remedy="omit --config",
            )
        return plan
    if segments is None and num_segments not in (None, count):
        raise DataError(f"{count} segments, not {num_segments}", file=folder, remedy="remove those that are too many")
    record = None
    if (tokenizer := tokenizer_in(folder)) is not None:
        from data_tools.sources.text_encoder import read_vocab_size  # loads the tokenizers' libraries, 150 MB

        record = TokenizerRecord(tokenizer.name, sha256_file(tokenizer), read_vocab_size(tokenizer))
        if vocab_size is not None and vocab_size != record.vocab_size:
            raise DataError(
                f"has {record.vocab_size} ids, --vocab-size says {vocab_size}",
                file=tokenizer,
                remedy="omit --vocab-size",
            )
        vocab_size = record.vocab_size
    return DatasetPlan(
        num_segments=count if segments is None else segments.stop,
        row_length=row_length or ROW_LENGTH,
        vocab_size=vocab_size or VOCAB_SIZE,
        tokenizer=record,
        sources=sources or AMBER_SOURCES,
    )


def index(
    folder: Path, output: Path, plan: DatasetPlan, policy: ErrorPolicy, segments: range | None = None, threads: int = 1
) -> DatasetManifest | None:
    """Indexes the segments under `folder` into `output`; with `segments`, only those, and no manifest of the whole.

    Raises:
        DataError: see `index_segment` and `write_dataset_manifest`.
    """
    work = _work(folder, output, plan, segments)
    with segments_lock(output, segments):
        keep_tokenizer(tokenizer_in(folder), output)
        with Progress("index", sum(file_size(path) for path, _ in work), "B") as progress:
            for path, base in work:
                index_segment(path, base, plan, policy, threads)
                progress.advance(file_size(path))
        return write_dataset_manifest(output, plan) if segments is None else None


def merge(folder: Path, output: Path, plan: DatasetPlan) -> DatasetManifest:
    """Writes the manifest of the data set whose segments were indexed one by one.

    Raises:
        DataError: segments are missing, or made from others than those under `folder`.
    """
    for path, base in _work(folder, output, plan, None):
        _is_finished(path, base, plan)
    return write_dataset_manifest(output, plan)


def _work(folder: Path, output: Path, plan: DatasetPlan, segments: range | None) -> list[tuple[Path, Path]]:
    """The JSONL files to index, each with its segment's path without suffix."""
    wanted = chosen_segments(segments, plan.num_segments, folder)
    paths = dict(list_segments(folder, wanted))
    _refuse_added(paths, output)
    work = [(paths[k], output / segment_name(k)) for k in wanted]
    if plan.has_held_out and 0 in wanted:
        if folder.resolve() == output.resolve():
            raise DataError("is --input too, whose held_out.json is needed", file=output, remedy="use another --output")
        work.append((folder / f"{HELD_OUT_NAME}.jsonl", output / HELD_OUT_NAME))
    return work


def _refuse_added(paths: dict[int, Path], output: Path) -> None:
    """Raises DataError where a segment is not of the data set that was finished in `output`: what reads that knows its
    manifest, and a run's steps name other rows of a larger one."""
    manifest = output / MANIFEST_NAME
    if not manifest.is_file():
        return
    try:
        count = DatasetManifest.read(manifest).num_segments
    except DataError:  # damaged: written anew
        return
    if added := [path for number, path in sorted(paths.items()) if number >= count]:
        raise DataError(
            f"was not there when {output} was finished, with {count} segments",
            file=added[0],
            remedy=f"take it away, use another --output, or remove {manifest} to make a larger data set of all",
        )


def _source(path: Path) -> dict[str, Any]:
    """What a segment's manifest says from the start of the file that it is made from."""
    return {"file": path.name, "bytes": file_size(path)}


def index_segment(path: Path, base: Path, plan: DatasetPlan, policy: ErrorPolicy, threads: int = 1) -> None:
    """Turns one JSONL segment into the files of `base`; does nothing where an earlier run has finished it.

    Args:
        threads: how many blocks are parsed at once; with 1, everything runs on the calling thread.

    Raises:
        DataError: the first bad row, with line and column; too many bad rows; a file that cannot be decompressed; no
            rows at all; files made from other input.
    """
    if _is_finished(path, base, plan):
        return
    source = _source(path)
    reader = SegmentReader(path, plan.row_length, plan.vocab_size, policy, plan.sources, threads)
    digest = new_digest()
    with write_beside(base.with_suffix(".bin")) as stream, unchanged(path, source["bytes"]):
        reserved = 0
        for ids in reader.blocks():
            if stream.tell() + ids.nbytes > reserved:
                reserved = reserve(stream)
            stream.write(ids.data)
            digest.update(ids.data)
    if not reader.rows:
        raise DataError("no rows", file=path, remedy="fetch or mix the segment again")
    rejected_path = base.with_suffix(".rejected.jsonl")
    rejected_path.unlink(missing_ok=True)
    if reader.rejected:
        write_whole(rejected_path, b"".join(reader.rejected))
    source |= {"xxh3_128": reader.digest.hexdigest(), "lines": reader.lines}
    _check_input_digest(path, source["xxh3_128"])
    write_companions(base, reader.codes, reader.rows, plan, len(reader.rejected), source, digest.hexdigest())


def _is_finished(path: Path, base: Path, plan: DatasetPlan) -> bool:
    """Whether an earlier run has made `base` from this file; one touched since is read again for its digest."""
    manifest = finished_segment(base, plan, _source(path))
    if manifest is None:
        return False
    marker = base.with_suffix(".json")
    if touched_since(path, marker):
        digest = new_digest()
        with Progress(f"{path.name}, touched since, again", file_size(path), "B") as progress:
            with contextlib.suppress(DataError), unpacking_named(path, ""), errors_named(path):
                digest_stream(open_decompressed(path), digest)
            progress.advance(file_size(path))
        if digest.hexdigest() != manifest.input.get("xxh3_128"):
            raise DataError(
                f"not what {base.name} was made from any more",
                file=path,
                remedy=f"bring the old file back, or remove {base.name}.* to build it again",
            )
    return True


def _check_input_digest(path: Path, digest: Any) -> None:
    """Compares a segment's bytes with the manifest that `mix` or `fetch` wrote beside it, where there is one."""
    marker = path.parent / f"{path.name.split('.')[0]}.json"
    if marker.is_file() and path.name.endswith(".jsonl"):
        remedy = "mix or fetch the segment again"
        record = read_json(marker, remedy)
        with fields_named(marker, remedy):
            expected = record["digests"]["jsonl"]
        if digest != expected:
            raise DataError(
                f"its digest is {digest}, its manifest says {expected}", file=path, remedy="mix or fetch it again"
            )
