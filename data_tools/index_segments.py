"""`index`: JSONL segments -> `.bin`, `.idx`, `.src`, each row checked."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

from data_tools.durable import folder_lock, reserve, write_beside, write_whole
from data_tools.format import (
    HELD_OUT_NAME,
    ROW_LENGTH,
    VOCAB_SIZE,
    DataError,
    DatasetManifest,
    TokenizerRecord,
    fields_named,
    file_size,
    new_digest,
    read_json,
    segment_name,
    sha256_file,
    tokenizer_in,
)
from data_tools.jsonl_segments import MIX_MANIFEST, list_segments
from data_tools.progress import Progress
from data_tools.segment_files import (
    DatasetPlan,
    carry_tokenizer,
    finished_segment,
    write_companions,
    write_dataset_manifest,
)
from data_tools.segment_reader import ErrorPolicy, SegmentReader


def plan_dataset(folder: Path, row_length: int | None, vocab_size: int | None) -> DatasetPlan:
    """What `mix.json` says of a folder of JSONL segments, or, without one, what its files and the arguments say.

    Raises:
        DataError: arguments that contradict `mix.json` or the tokenizer in the folder.
    """
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
            )
        for name, given in (("row_length", row_length), ("vocab_size", vocab_size)):
            if given is not None and given != getattr(plan, name):
                raise DataError(f"{name} is {getattr(plan, name)}, not {given}", file=path, remedy=f"omit --{name}")
        return plan
    record = None
    if (tokenizer := tokenizer_in(folder)) is not None:
        from data_tools.text_encoder import read_vocab_size  # loads the tokenizers' libraries, 150 MB

        record = TokenizerRecord(tokenizer.name, sha256_file(tokenizer), read_vocab_size(tokenizer))
        if vocab_size is not None and vocab_size != record.vocab_size:
            raise DataError(
                f"has {record.vocab_size} ids, --vocab-size says {vocab_size}",
                file=tokenizer,
                remedy="omit --vocab-size",
            )
        vocab_size = record.vocab_size
    return DatasetPlan(
        num_segments=len(list(list_segments(folder))),
        row_length=row_length or ROW_LENGTH,
        vocab_size=vocab_size or VOCAB_SIZE,
        tokenizer=record,
    )


def index(
    folder: Path, output: Path, plan: DatasetPlan, policy: ErrorPolicy, segments: range | None = None, threads: int = 1
) -> DatasetManifest | None:
    """Indexes the segments under `folder` into `output`; with `segments`, only those, and no manifest of the whole.

    Raises:
        DataError: see `index_segment` and `write_dataset_manifest`.
    """
    paths = dict(list_segments(folder))
    wanted = segments or range(plan.num_segments)
    if wanted.stop > len(paths):
        raise DataError(f"no segment {wanted.stop - 1}: there are {len(paths)}", file=folder, remedy="check --segment")
    work = [(paths[k], output / segment_name(k)) for k in wanted]
    if plan.has_held_out and 0 in wanted:
        work.append((folder / f"{HELD_OUT_NAME}.jsonl", output / HELD_OUT_NAME))
    part = "" if segments is None else f".{wanted.start:03d}-{wanted.stop - 1:03d}"
    with folder_lock(output, shared=segments is not None), folder_lock(output, f".lock{part}.index"):
        carry_tokenizer(folder, output)
        with Progress("index", sum(file_size(path) for path, _ in work), "B") as progress:
            for path, base in work:
                index_segment(path, base, plan, policy, threads)
                progress.advance(file_size(path))
        return write_dataset_manifest(output, plan) if segments is None else None


def index_segment(path: Path, base: Path, plan: DatasetPlan, policy: ErrorPolicy, threads: int = 1) -> None:
    """Turns one JSONL segment into the files of `base`; does nothing where an earlier run has finished it.

    Args:
        threads: how many blocks are parsed at once; with 1, everything runs on the calling thread.

    Raises:
        DataError: the first bad row, with line and column; too many bad rows; a file that cannot be decompressed; no
            rows at all; files made from other input.
    """
    source: dict[str, Any] = {"file": path.name, "bytes": file_size(path)}
    if finished_segment(base, plan, source) is not None:
        return
    reader = SegmentReader(path, plan.row_length, plan.vocab_size, policy, threads)
    digest = new_digest()
    with write_beside(base.with_suffix(".bin")) as stream:
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
