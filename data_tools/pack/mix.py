"""`mix`: rows of all sources -> segments of equal row counts, round-robin in the order of the sources' list.

Row i of the mix goes to segment i mod `num_segments`; the rows after the last full round are dropped and counted. The
output is Amber's JSONL (`train_000.jsonl` ...) or, with `direct`, the indexed binaries themselves.

All segments of a run grow together. From time to time everything is fsynced and a journal says how far each file is;
a run that was killed cuts every file back to the journal and goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools.dataset.format import (
    AMBER_SOURCES,
    HELD_OUT_NAME,
    DatasetManifest,
    SegmentManifest,
    TokenizerRecord,
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
from data_tools.files.digest import digest_stream, new_digest
from data_tools.files.durable import full_disk_named, partial_path, publish, write_beside, write_whole
from data_tools.files.errors import DataError
from data_tools.files.json_file import canonical_json, read_json, read_sealed, sealed
from data_tools.files.plain_file import file_size
from data_tools.files.progress import Progress
from data_tools.index.jsonl_segments import MIX_MANIFEST, jsonl_lines, jsonl_name
from data_tools.pack.rows import MixedRows, open_sources
from data_tools.pack.shared_text import refuse_shared_text

BLOCK_BYTES = 1 << 25
JOURNAL_BYTES = 1 << 32
OTHER_OPEN_FILES = 64  # than the segments: locks, rows, libraries


@dataclass(frozen=True)
class MixOptions:
    """What decides the bytes that `mix` writes."""

    num_segments: int
    direct: bool
    held_out_per_source: int
    seed: int


def mix(
    folder: Path,
    output: Path,
    options: MixOptions,
    segments: range | None = None,
    names: tuple[str, ...] = AMBER_SOURCES,
    held_out: Path | None = None,
) -> DatasetManifest | dict[str, Any] | None:
    """Mixes the sources under `folder` into `output`; with `segments`, only those.

    Args:
        names: the list of sources, in the order of their codes and of their rows in each round.
        held_out: tokenised documents that are held out whole, all their rows, in place of `held_out_per_source`.

    Returns:
        The manifest of the whole, or None where only some segments were asked for and others are still missing.

    Raises:
        DataError: sources unfinished, damaged, unlike each other or with a text in common, fewer rows than segments, or
            a folder begun otherwise.
    """
    sources = open_sources(folder, names)
    refuse_shared_text(folder, sources)
    if absent := [name for name in names if name not in {source.name for source in sources}]:
        print(f"mix: no rows of {', '.join(absent)}", file=sys.stderr)
    apart = open_sources(held_out, names, like=sources[0]) if held_out else []
    mixed = MixedRows(sources, names, options.held_out_per_source, options.seed, apart)
    rounds = mixed.rows // options.num_segments
    if not rounds:
        raise DataError(
            f"{mixed.rows} rows are too few for {options.num_segments} segments",
            file=folder,
            remedy="use fewer --num-segments or more text",
        )
    first = sources[0].manifest
    plan = DatasetPlan(
        num_segments=options.num_segments,
        row_length=first["row_length"],
        vocab_size=first["vocab_size"],
        tokenizer=TokenizerRecord(**first["tokenizer"]),
        dropped_rows=mixed.rows - rounds * options.num_segments,
        rejected=sum(source.manifest["rejected"] for source in sources),
        has_held_out=options.held_out_per_source > 0 or bool(apart),
        sources=names,
    )
    made_of = {"options": asdict(options), "sources": [source.manifest for source in sources]}
    if names != AMBER_SOURCES:
        made_of["names"] = names
    if apart:
        made_of["held_out"] = [source.manifest for source in apart]
    identity = {"mix": hashlib.sha256(canonical_json(made_of)).hexdigest()}
    wanted = chosen_segments(segments, options.num_segments, folder)
    part = "" if segments is None else f"-{wanted.start:03d}-{wanted.stop - 1:03d}"
    with segments_lock(output, segments):
        keep_tokenizer(tokenizer_in(folder), output)
        _Mixer(mixed, rounds, plan, options, identity, output, f"mix{part}.journal").run(wanted)
        if plan.has_held_out and 0 in wanted:
            _write_held_out(mixed, plan, options, identity, output)
        if segments is not None:
            return None
        return write_dataset_manifest(output, plan) if options.direct else write_mix_manifest(output, plan)


@dataclass
class _Output:
    """One segment's growing file."""

    segment: int
    path: Path
    stream: BinaryIO
    digest: Any
    size: int


class _Mixer:
    """Writes the rounds of rows to the files of some segments."""

    def __init__(
        self,
        mixed: MixedRows,
        rounds: int,
        plan: DatasetPlan,
        options: MixOptions,
        identity: dict[str, str],
        output: Path,
        journal: str,
    ) -> None:
        self.mixed, self.rounds, self.plan, self.options = mixed, rounds, plan, options
        self.identity, self.output, self.journal = identity, output, output / journal

    def run(self, wanted: range) -> None:
        """Brings every wanted segment to its end; finished ones are left as they are."""
        bases = {k: self.output / segment_name(k) for k in wanted}
        if not self.options.direct:
            bases = {k: self.output / jsonl_name(k).removesuffix(".jsonl") for k in wanted}
        todo = [k for k in wanted if not self._finished(bases[k], k)]
        if todo:
            self._build(todo, bases)
        for path in (self.journal, partial_path(self.journal)):
            path.unlink(missing_ok=True)

    def _build(self, todo: list[int], bases: dict[int, Path]) -> None:
        suffix = ".bin" if self.options.direct else ".jsonl"
        paths = {k: bases[k].with_suffix(suffix) for k in todo}
        for path in paths.values():
            if path.exists():  # renamed, then killed before its manifest was written
                path.replace(partial_path(path))
        done, written = self._read_journal(todo)
        _allow_open_files(len(todo), self.output)
        outputs = [_open_output(k, paths[k], *written.get(str(k), (0, ""))) for k in todo]
        try:
            self._write_rounds(outputs, done)
        except BaseException:
            if not self.journal.is_file():  # the next run begins anew
                for out in outputs:
                    partial_path(out.path).unlink(missing_ok=True)
            raise
        finally:
            for out in outputs:
                with contextlib.suppress(OSError):  # a full disk, told already; after the journal nothing is buffered
                    out.stream.close()
        for out in outputs:
            publish(out.path)
            self._finish(bases[out.segment], out)

    def _source(self, segment: int) -> dict[str, Any]:
        return {**self.identity, "segment": segment}

    def _finished(self, base: Path, segment: int) -> bool:
        marker, path = base.with_suffix(".json"), base.with_suffix(".jsonl")
        if not marker.is_file():
            return False
        remedy = f"remove {marker} and mix again"
        manifest = read_json(marker, remedy)
        made = SegmentManifest.from_json(manifest, marker)
        self._refuse_other_sources(made, marker)
        if self.options.direct:
            return finished_segment(base, self.plan, self._source(segment)) is not None
        if made.input != self._source(segment):
            raise DataError("made from other rows", file=marker, remedy="use another --output or remove the folder")
        if file_size(path) != manifest.get("bytes"):
            raise DataError("its size is not that of its manifest", file=path, remedy=remedy)
        return True

    def _refuse_other_sources(self, made: SegmentManifest, marker: Path) -> None:
        """Raises DataError where a source came or went since a segment was finished."""
        before, now = made.rows_per_source.keys(), {source.name for source in self.mixed.sources}
        if made.input.get("mix") != self.identity["mix"] and before != now:
            raise DataError(
                f"has rows of {', '.join(sorted(before))}; the sources are {', '.join(sorted(now))} now",
                file=marker,
                remedy="bring the sources back as they were, use another --output, or remove what is in it",
            )

    def _read_journal(self, todo: list[int]) -> tuple[int, dict[str, tuple[int, str]]]:
        """How many rounds are written, and by segment how many bytes that made, with their digest."""
        if not self.journal.is_file():
            return 0, {}
        journal = read_sealed(self.journal, "remove the file to begin anew")
        if journal["identity"] != self.identity:
            raise DataError(
                "an unfinished mix of other rows or with other options",
                file=self.journal,
                remedy="use the same command as before, or another --output, or remove the folder",
            )
        known = set(map(str, todo)) <= set(journal["written"])
        return (journal["rounds"], journal["written"]) if known else (0, {})

    def _write_rounds(self, outputs: list[_Output], done: int) -> None:
        first, last = outputs[0].segment, outputs[-1].segment + 1
        row_bytes = self.plan.row_length * 2
        step = max(1, BLOCK_BYTES // (row_bytes * (last - first)))
        written = 0
        with Progress("mix", self.rounds * len(outputs), "rows") as progress:
            progress.advance(done * len(outputs))
            while done < self.rounds:
                count = min(step, self.rounds - done)
                rows, codes = self._read_rounds(done, count, first, last)
                for out in outputs:
                    chunk, chunk_codes = rows[:, out.segment - first], codes[:, out.segment - first]
                    content = (
                        chunk.tobytes() if self.options.direct else jsonl_lines(chunk, chunk_codes, self.plan.sources)
                    )
                    with full_disk_named(out.path):
                        out.stream.write(content)
                    out.digest.update(content)
                    out.size += len(content)
                    written += len(content)
                done += count
                progress.advance(count * len(outputs))
                if written >= JOURNAL_BYTES or done == self.rounds:
                    self._write_journal(outputs, done)
                    written = 0

    def _read_rounds(self, start: int, count: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of rounds [start, start + count) for segments [first, last): [count, last - first, row_length]."""
        per_round = self.options.num_segments
        if last - first == per_round:
            rows, codes = self.mixed.read(start * per_round, count * per_round)
            return rows.reshape(count, per_round, -1), codes.reshape(count, per_round)
        pieces = [self.mixed.read(i * per_round + first, last - first) for i in range(start, start + count)]
        return np.stack([rows for rows, _ in pieces]), np.stack([codes for _, codes in pieces])

    def _write_journal(self, outputs: list[_Output], done: int) -> None:
        for out in outputs:
            with full_disk_named(out.path):
                out.stream.flush()
                os.fsync(out.stream.fileno())
        written = {str(out.segment): (out.size, out.digest.hexdigest()) for out in outputs}
        journal = {"identity": self.identity, "rounds": done, "written": written}
        write_whole(self.journal, canonical_json(sealed(journal)))

    def _finish(self, base: Path, out: _Output) -> None:
        codes = self.mixed.codes(out.segment, self.options.num_segments, self.rounds)
        source = self._source(out.segment)
        if self.options.direct:
            write_companions(base, codes, self.rounds, self.plan, 0, source, out.digest.hexdigest())
            return
        known = len(self.plan.sources)
        counts = sum(np.bincount(np.frombuffer(c, np.uint8), minlength=known) for c in codes)
        _write_jsonl_manifest(base, self.rounds, counts, self.plan, source, out.digest.hexdigest(), out.size)


def _allow_open_files(count: int, output: Path) -> None:
    """Raises this process's limit of open files, where it must, so that `count` segments grow together."""
    needed = count + OTHER_OPEN_FILES
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    if highest < needed:
        raise DataError(
            f"{count} segments grow together, but this process may open {highest} files",
            file=output,
            remedy=f"raise the limit (ulimit -Hn {needed}), or mix some at a time with --segment",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, needed), highest))


def _open_output(segment: int, path: Path, size: int, expected: str) -> _Output:
    """Opens the partial file of `path` to go on at byte `size`; what lies before is read again for its digest."""
    partial = partial_path(path)
    digest = new_digest()
    if size:
        stream: BinaryIO = partial.open("r+b")
        stream.truncate(min(stream.seek(0, 2), size))
        stream.seek(0)
        digest_stream(stream, digest)
        if digest.hexdigest() != expected:
            raise DataError(
                "not as its journal says", file=partial, remedy="remove mix*.journal beside it to begin anew"
            )
    else:
        stream = partial.open("wb")
    return _Output(segment, path, stream, digest, size)


def _write_jsonl_manifest(
    base: Path, rows: int, counts: Any, plan: DatasetPlan, source: dict[str, Any], digest: str, size: int
) -> None:
    manifest = plan.segment(base.name, rows, counts, 0, source, {"jsonl": digest})
    write_whole(base.with_suffix(".json"), canonical_json({**manifest.to_json(), "bytes": size}))


def _write_held_out(
    mixed: MixedRows, plan: DatasetPlan, options: MixOptions, identity: dict[str, str], output: Path
) -> None:
    base = output / HELD_OUT_NAME
    source = {**identity, "held_out_per_source": options.held_out_per_source, "seed": options.seed}
    marker = base.with_suffix(".json")
    if marker.is_file() and SegmentManifest.read(marker).input == source:
        return
    rows, codes = mixed.read_held_out()
    content = rows.tobytes() if options.direct else jsonl_lines(rows, codes, plan.sources)
    digest = new_digest()
    digest.update(content)
    with write_beside(base.with_suffix(".bin" if options.direct else ".jsonl")) as stream:
        stream.write(content)
    if options.direct:
        write_companions(base, [codes.tobytes()], len(rows), plan, 0, source, digest.hexdigest())
    else:
        counts = np.bincount(codes, minlength=len(plan.sources))
        _write_jsonl_manifest(base, len(rows), counts, plan, source, digest.hexdigest(), len(content))


def write_mix_manifest(output: Path, plan: DatasetPlan) -> dict[str, Any]:
    """Writes `mix.json`, which says what the JSONL segments of a folder are.

    Raises:
        DataError: segments are missing.
    """
    names = [jsonl_name(k).removesuffix(".jsonl") for k in range(plan.num_segments)]
    if plan.has_held_out:
        names.append(HELD_OUT_NAME)
    missing = [name for name in names if not (output / f"{name}.json").is_file()]
    if missing:
        raise DataError(f"missing: {', '.join(missing)}", file=output, remedy="mix those segments, then all")
    value = {**asdict(plan), "segments": [read_json(output / f"{name}.json", "mix again") for name in names]}
    write_whole(output / MIX_MANIFEST, canonical_json(value))
    return value
