"""`tokenize`: a source's documents -> its stream of token ids, kept in parts that together are the source's rows.

Documents follow each other, each with EOS after it, and are cut into rows with no overlap (paper, section 3.3), so
row i is ids [i * row_length, (i + 1) * row_length) of the stream. The stream lies in parts, one a unit of work
(units.py); what is left after the last whole row is counted and kept in `tail.tokens`.

    arxiv/part_00000.tokens      uint16 little-endian
    arxiv/part_00000.pages       a digest for each page of it (rows.py)
    arxiv/part_00000.json        its manifest; written last
    arxiv/part_00000.rejected.jsonl   bad documents, where there are some and --on-error quarantine
    arxiv/tail.tokens            the last, short row
    arxiv/source.json            the source's manifest; written when all parts are there
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.dataset.format import SOURCE_NAME, TOKEN_DTYPE, TOOL_VERSION
from data_tools.dataset.segment_files import keep_tokenizer
from data_tools.files.durable import PARTIAL_SUFFIX, folder_lock, touched_since, write_whole
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.files.json_file import canonical_json, read_sealed, sealed
from data_tools.files.plain_file import file_size
from data_tools.files.progress import Progress
from data_tools.pack.rows import SOURCE_MANIFEST
from data_tools.pack.tokenize_unit import Job, TokenizeOptions, do
from data_tools.pack.units import (
    REMOVE_AND_AGAIN,
    Unit,
    file_sizes,
    fitting_units,
    part_name,
    read_records,
)
from data_tools.sources.documents import (
    TASK_BYTES,
    Task,
    plan_tasks,
    read_documents,
)
from data_tools.sources.source_files import list_files, list_left_out
from data_tools.sources.text_encoder import TextEncoder

SAMPLE_DOCUMENTS = 32
SAMPLE_CHARACTERS = 1 << 16
_PR_SET_PDEATHSIG = 1


def tokenize_source(
    source: str,
    folder: Path,
    output: Path,
    tokenizer: Path,
    *,
    row_length: int,
    workers: int = 1,
    policy: ErrorPolicy = ErrorPolicy(),  # noqa: B008
    task_bytes: int = TASK_BYTES,
) -> dict[str, Any]:
    """Tokenises one source into `output / source` and returns its manifest. Finished parts are kept.

    Raises:
        DataError: no source's name, no files, a bad document that `policy` does not set aside, a folder begun with
            other options, or gigatoken differing from the Hugging Face tokenizer on the sample.
    """
    if not SOURCE_NAME.fullmatch(source):
        raise DataError(f"{source!r} is no source's name", file=folder, remedy="use 1 to 64 letters, digits, _ . + -")
    target = output / source
    if target.resolve().is_relative_to(folder.resolve()):
        raise DataError("lies in the folder of the source's files", file=target, remedy="use another --output")
    encoder = TextEncoder(tokenizer)
    record = encoder.record()
    options = TokenizeOptions(row_length, record.sha256, record.vocab_size, encoder.eos_id, task_bytes)
    tasks = plan_tasks(folder, task_bytes)
    for left_out in list_left_out(folder):
        print(f"{source}: {left_out}", file=sys.stderr)
    with folder_lock(target):
        records, finished = read_records(target), _read_finished(target)
        parts = len(finished["parts"]) if finished else None
        units = fitting_units(tasks, file_sizes(folder, tasks), asdict(options), target, records, parts)
        waiting = [i for i, unit in enumerate(units) if not _is_done(folder, target, i, unit, records.get(i))]
        if waiting:
            encoder.check([text for _, text in _sample(folder)], folder)
            keep_tokenizer(tokenizer, output)
        jobs = [Job(folder, units[i], target, i, tokenizer, options, policy, records.get(i)) for i in waiting]
        progress = Progress(f"tokenize {source}", sum(unit.bytes for unit in units), unit="B")
        progress.advance(progress.total - sum(job.unit.bytes for job in jobs))
        rejected = sum(record["rejected"] for record in records.values())
        _refuse_more_than(policy, rejected, target)
        with progress, contextlib.closing(_run(jobs, workers)) as done:
            for job, rejected_here in done:
                progress.advance(job.unit.bytes)
                rejected += rejected_here
                _refuse_more_than(policy, rejected, target)
        return _finish_source(source, folder, target, options, asdict(record), len(units), finished)


def _refuse_more_than(policy: ErrorPolicy, rejected: int, target: Path) -> None:
    if rejected > policy.max_rejected:
        raise DataError(
            f"{rejected} bad documents, more than {policy.max_rejected}",
            file=target,
            remedy="look at the .rejected.jsonl files, or raise --max-rejected",
        )


def _read_finished(target: Path) -> dict[str, Any] | None:
    """The source's manifest, where an earlier run came to its end; a damaged one is written anew from the parts."""
    try:
        return read_sealed(target / SOURCE_MANIFEST, REMOVE_AND_AGAIN)
    except DataError:
        return None


def _sample(folder: Path) -> Iterator[tuple[Path, str]]:
    """Documents from the first, middle and last file of a source, for the check against the reference tokenizer."""
    files = list_files(folder)
    for path in {files[0]: None, files[len(files) // 2]: None, files[-1]: None}:
        task = Task(path.relative_to(folder).as_posix(), 0, None)
        taken = 0
        for document in read_documents(folder, task):
            if not document.reason:
                yield path, document.text[:SAMPLE_CHARACTERS]
                taken += 1
            if taken == SAMPLE_DOCUMENTS:
                break


def _is_done(folder: Path, target: Path, number: int, unit: Unit, record: dict[str, Any] | None) -> bool:
    """Whether a part is finished, and its input as old: what was touched since is read again for its digest (`do`)."""
    if record is None:
        return False
    marker = target / f"{part_name(number)}.json"
    tokens = target / f"{part_name(number)}.tokens"
    if file_size(tokens) != record["tokens"] * TOKEN_DTYPE.itemsize:
        raise DataError("size differs from the part's manifest", file=tokens, remedy=f"remove {marker} and run again")
    return not any(touched_since(folder / task.file, marker) for task in unit.tasks)


def _run(jobs: list[Job], workers: int) -> Generator[tuple[Job, int], None, None]:
    """Does the jobs, in any order; yields each with the number of its bad documents."""
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, do(job)
        return
    # Spawned, not forked: gigatoken and pyarrow have threads, which a fork would lose.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _die_with, (os.getpid(),)) as pool:
        queue = iter(jobs)
        try:
            running = _submit(pool, islice(queue, 2 * workers))
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
                running |= _submit(pool, islice(queue, len(done)))
        except BaseException as error:
            for process in multiprocessing.active_children():  # what they are at may take minutes, and is not kept
                process.kill()
            pool.shutdown(cancel_futures=True)
            for partial in jobs[0].target.glob(f"*{PARTIAL_SUFFIX}"):
                partial.unlink()
            if isinstance(error, BrokenProcessPool):
                raise DataError(
                    "a worker process was killed, as the kernel does when memory runs out",
                    file=jobs[0].target,
                    remedy="run the same command again with fewer --workers or more memory: finished parts are kept",
                ) from None
            raise


def _submit(pool: ProcessPoolExecutor, jobs: Iterator[Job]) -> dict[Future[int], Job]:
    """Hands jobs to the pool; what is spawned for them never sees the terminal's Ctrl-C, which is this process's."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return {pool.submit(do, job): job for job in jobs}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_with(parent: int) -> None:
    """Ends this worker when its parent ends, however that ends: it would wait for work, or write, for ever."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # ended already
        os._exit(1)


def _finish_source(
    source: str,
    folder: Path,
    target: Path,
    options: TokenizeOptions,
    tokenizer: dict[str, Any],
    parts: int,
    finished: dict[str, Any] | None,
) -> dict[str, Any]:
    manifests = [read_sealed(target / f"{part_name(i)}.json", "run tokenize again") for i in range(parts)]
    tokens = sum(manifest["tokens"] for manifest in manifests)
    rejected = sum(manifest["rejected"] for manifest in manifests)
    if not any(manifest["documents"] for manifest in manifests):
        raise DataError("no documents", file=folder, remedy="fetch or copy the source again")
    for part, before in zip(manifests, finished["parts"] if finished else manifests, strict=True):
        if part["input_digest"] != before["input_digest"]:
            raise DataError(
                f"{before['name']} was made from other text before",
                file=folder,
                remedy=f"bring the old files back, or use another --output, or remove {target}",
            )
    tail_tokens = tokens % options.row_length
    tail = target / "tail.tokens"
    write_whole(tail, _last_bytes(target, parts, tail_tokens * TOKEN_DTYPE.itemsize))
    manifest = sealed(
        {
            "source": source,
            "row_length": options.row_length,
            "vocab_size": options.vocab_size,
            "eos_id": options.eos_id,
            "tokenizer": tokenizer,
            "rows": tokens // options.row_length,
            "tokens": tokens,
            "tail_tokens": tail_tokens,
            "documents": sum(manifest["documents"] for manifest in manifests),
            "characters": sum(manifest["characters"] for manifest in manifests),
            "rejected": rejected,
            "parts": [
                {
                    "name": part_name(i),
                    **{name: manifest[name] for name in ("tokens", "pages_digest", "input_digest")},
                    **_made_from(manifest),
                }
                for i, manifest in enumerate(manifests)
            ],
            "tool_version": TOOL_VERSION,
        }
    )
    write_whole(target / SOURCE_MANIFEST, canonical_json(manifest))
    return manifest


def _made_from(manifest: dict[str, Any]) -> dict[str, Any]:
    """A part's file, or the first of several and how many there are; its record has them all."""
    identity = manifest["identity"]
    if "task" in identity:
        heads = {"input_heads": manifest["input_heads"]} if "input_heads" in manifest else {}
        return {"file": identity["task"]["file"], **heads}
    return {"file": identity["tasks"][0][0], "files": len({entry[0] for entry in identity["tasks"]})}


def _last_bytes(target: Path, parts: int, count: int) -> bytes:
    """The last `count` bytes of the concatenated parts."""
    pieces: list[bytes] = []
    for number in reversed(range(parts)):
        if not count:
            break
        path = target / f"{part_name(number)}.tokens"
        size = path.stat().st_size
        take = min(size, count)
        with path.open("rb") as stream:
            stream.seek(size - take)
            pieces.append(stream.read(take))
        count -= take
    return b"".join(reversed(pieces))
