"""`tokenize`: a source's documents -> its stream of token ids, kept in parts that together are the source's rows.

Documents follow each other, each with EOS after it, and are cut into rows with no overlap (paper, section 3.3), so
row i is ids [i * row_length, (i + 1) * row_length) of the stream. The stream lies in parts, one a task (documents.py);
what is left after the last whole row is counted and kept in `tail.tokens`.

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
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data_tools.dataset.format import SOURCE_NAME, TOKEN_DTYPE, TOOL_VERSION
from data_tools.dataset.segment_files import keep_tokenizer
from data_tools.files.digest import new_digest
from data_tools.files.durable import PARTIAL_SUFFIX, folder_lock, touched_since, unchanged, write_beside, write_whole
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.files.json_file import canonical_json, read_sealed, sealed
from data_tools.files.plain_file import file_size
from data_tools.files.progress import Progress
from data_tools.pack.rows import PAGE_BYTES, SOURCE_MANIFEST, page_digests
from data_tools.sources.documents import (
    TASK_BYTES,
    Document,
    Task,
    list_files,
    list_left_out,
    plan_tasks,
    read_documents,
    rejected_line,
)
from data_tools.sources.text_encoder import TextEncoder

BATCH_CHARACTERS = 1 << 23  # a call of gigatoken costs 3 ms before its first document
LEFT_OUT_NAMES = 10
SAMPLE_DOCUMENTS = 32
SAMPLE_CHARACTERS = 1 << 16
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class TokenizeOptions:
    """What decides the bytes that `tokenize` writes; kept in every part's manifest."""

    row_length: int
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    task_bytes: int = TASK_BYTES
    tool_version: str = TOOL_VERSION


def part_name(number: int) -> str:
    return f"part_{number:05d}"


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
    if left_out := list_left_out(folder):
        first = ", ".join(map(ascii, left_out[:LEFT_OUT_NAMES])) + (", ..." if left_out[LEFT_OUT_NAMES:] else "")
        print(f"{source}: {len(left_out):,} files are neither JSONL nor Parquet and left out: {first}", file=sys.stderr)
    with folder_lock(target):
        identities = [_identity(folder, task, options) for task in tasks]
        waiting = [i for i, identity in enumerate(identities) if not _is_done(folder, target, i, identity)]
        if waiting:
            encoder.check([text for _, text in _sample(folder)], folder)
            keep_tokenizer(tokenizer, output)
        jobs = [_Job(folder, tasks[i], target, i, tokenizer, identities[i], policy) for i in waiting]
        total = sum(_task_size(folder, task) for task in tasks)
        progress = Progress(f"tokenize {source}", total, unit="B")
        progress.advance(total - sum(_task_size(folder, tasks[i]) for i in waiting))
        with progress, contextlib.closing(_run(jobs, workers)) as finished:
            for job in finished:
                progress.advance(_task_size(folder, job.task))
        return _finish_source(source, folder, target, options, asdict(record), len(tasks), policy)


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


def _task_size(folder: Path, task: Task) -> int:
    return task.stop - task.start if task.stop is not None else file_size(folder / task.file)


def _identity(folder: Path, task: Task, options: TokenizeOptions) -> dict[str, Any]:
    return {"task": asdict(task), "input_bytes": file_size(folder / task.file), "options": asdict(options)}


def _is_done(folder: Path, target: Path, number: int, identity: dict[str, Any]) -> bool:
    """Whether a part is finished, and its input as old: one touched since is read again for its digest (`_do`)."""
    marker = target / f"{part_name(number)}.json"
    if not marker.is_file():
        return False
    manifest = read_sealed(marker, "remove it and run again")
    if manifest.get("identity") != identity:
        raise DataError(
            "made from other input or with other options",
            file=marker,
            remedy=f"use the same command as before, or another --output, or remove {target}",
        )
    tokens = target / f"{part_name(number)}.tokens"
    if file_size(tokens) != manifest["tokens"] * TOKEN_DTYPE.itemsize:
        raise DataError("size differs from the part's manifest", file=tokens, remedy=f"remove {marker} and run again")
    return not touched_since(folder / identity["task"]["file"], marker)


@dataclass(frozen=True)
class _Job:
    folder: Path
    task: Task
    target: Path
    number: int
    tokenizer: Path
    identity: dict[str, Any]
    policy: ErrorPolicy


_encoders: dict[Path, TextEncoder] = {}


def _run(jobs: list[_Job], workers: int) -> Generator[_Job, None, None]:
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield _do(job)
        return
    # Spawned, not forked: gigatoken and pyarrow have threads, which a fork would lose.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, _die_with, (os.getpid(),)) as pool:
        queue = iter(jobs)
        try:
            running = _submit(pool, islice(queue, 2 * workers))
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
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


def _submit(pool: ProcessPoolExecutor, jobs: Iterator[_Job]) -> set[Future[_Job]]:
    """Hands jobs to the pool; what is spawned for them never sees the terminal's Ctrl-C, which is this process's."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return {pool.submit(_do, job) for job in jobs}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _die_with(parent: int) -> None:
    """Ends this worker when its parent ends, however that ends: it would wait for work, or write, for ever."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # ended already
        os._exit(1)


def _do(job: _Job) -> _Job:
    """Tokenises one task into its part; runs in a worker process."""
    path = job.folder / job.task.file
    return _check_input(job, path) if _marker(job).is_file() else _tokenize(job, path)


def _marker(job: _Job) -> Path:
    return job.target / f"{part_name(job.number)}.json"


def _check_input(job: _Job, path: Path) -> _Job:
    """Raises DataError where a finished part's input is another one by now."""
    digest = new_digest()
    for _ in read_documents(job.folder, job.task, digest):
        pass
    if digest.hexdigest() != read_sealed(_marker(job), "remove it and run again")["input_digest"]:
        raise DataError(
            f"not what {_marker(job).name} was made from any more",
            file=path,
            remedy=f"bring the old file back, or use another --output, or remove {job.target}",
        )
    return job


def _tokenize(job: _Job, path: Path) -> _Job:
    if job.tokenizer not in _encoders:
        _encoders[job.tokenizer] = TextEncoder(job.tokenizer)
    encoder = _encoders[job.tokenizer]
    base = job.target / part_name(job.number)
    rejected_path = base.with_suffix(".rejected.jsonl")
    input_digest = new_digest()
    tokens = documents = characters = 0
    rejected: list[Document] = []
    pages, rest = [], b""
    with write_beside(base.with_suffix(".tokens")) as stream, unchanged(path, job.identity["input_bytes"]):
        for batch in _batches(job, rejected, input_digest):
            ids, lengths = encoder.encode(batch)
            stream.write(ids.data)
            content = memoryview(rest + ids.tobytes())
            whole = len(content) // PAGE_BYTES * PAGE_BYTES
            pages.append(page_digests(content[:whole]).tobytes())
            rest = bytes(content[whole:])
            tokens += len(ids)
            documents += len(lengths)
            characters += sum(map(len, batch))
    pages.append(page_digests(memoryview(rest)).tobytes())
    all_pages, pages_digest = b"".join(pages), new_digest()
    pages_digest.update(all_pages)
    write_whole(base.with_suffix(".pages"), all_pages)
    rejected_path.unlink(missing_ok=True)
    if rejected:
        write_whole(rejected_path, b"".join(rejected_line(job.task.file, document) for document in rejected))
    manifest = {
        "identity": job.identity,
        "tokens": tokens,
        "documents": documents,
        "characters": characters,
        "rejected": len(rejected),
        "input_digest": input_digest.hexdigest(),
        "pages_digest": pages_digest.hexdigest(),
    }
    write_whole(base.with_suffix(".json"), canonical_json(sealed(manifest)))
    return job


def _batches(job: _Job, rejected: list[Document], input_digest: Any) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in read_documents(job.folder, job.task, input_digest):
        if document.reason:
            _reject(job, document, rejected)
            continue
        batch.append(document.text)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _reject(job: _Job, document: Document, rejected: list[Document]) -> None:
    if not job.policy.quarantine:
        raise DataError(
            document.reason,
            file=job.folder / job.task.file,
            place=document.place,
            remedy="mend the document, or set bad ones aside with --on-error quarantine",
        )
    rejected.append(document)
    if len(rejected) > job.policy.max_rejected:
        raise DataError(
            f"more than {job.policy.max_rejected} bad documents, the last: {document.reason}",
            file=job.folder / job.task.file,
            place=document.place,
            remedy="look at the source, or raise --max-rejected",
        )


def _finish_source(
    source: str,
    folder: Path,
    target: Path,
    options: TokenizeOptions,
    tokenizer: dict[str, Any],
    parts: int,
    policy: ErrorPolicy,
) -> dict[str, Any]:
    manifests = [read_sealed(target / f"{part_name(i)}.json", "run tokenize again") for i in range(parts)]
    tokens = sum(manifest["tokens"] for manifest in manifests)
    rejected = sum(manifest["rejected"] for manifest in manifests)
    if not any(manifest["documents"] for manifest in manifests):
        raise DataError("no documents", file=folder, remedy="fetch or copy the source again")
    if rejected > policy.max_rejected:
        raise DataError(
            f"{rejected} bad documents, more than {policy.max_rejected}",
            file=target,
            remedy="look at the .rejected.jsonl files, or raise --max-rejected",
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
                    "file": manifest["identity"]["task"]["file"],
                }
                for i, manifest in enumerate(manifests)
            ],
            "tool_version": TOOL_VERSION,
        }
    )
    write_whole(target / SOURCE_MANIFEST, canonical_json(manifest))
    return manifest


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
