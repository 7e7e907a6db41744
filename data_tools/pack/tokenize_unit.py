"""One unit of `tokenize`: its documents to the files of its part. Runs in a worker process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.dataset.format import TOOL_VERSION
from data_tools.files.digest import new_digest
from data_tools.files.durable import touched_since, unchanged, write_beside, write_whole
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.files.json_file import canonical_json, sealed
from data_tools.pack.rows import PAGE_BYTES, page_digests
from data_tools.pack.units import Unit, part_name
from data_tools.sources.documents import TASK_BYTES, Document, Task, read_documents, rejected_line
from data_tools.sources.source_files import PARQUET_SUFFIX
from data_tools.sources.text_encoder import TextEncoder

BATCH_CHARACTERS = 1 << 23  # a call of gigatoken costs 3 ms before its first document


@dataclass(frozen=True)
class TokenizeOptions:
    """What decides the bytes that `tokenize` writes; kept in every part's manifest."""

    row_length: int
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    task_bytes: int = TASK_BYTES
    tool_version: str = TOOL_VERSION


@dataclass(frozen=True)
class Job:
    folder: Path
    unit: Unit
    target: Path
    number: int
    tokenizer: Path
    options: TokenizeOptions
    policy: ErrorPolicy
    record: dict[str, Any] | None
    """Of the finished part, where only its input is to be compared."""


class _Digest:
    """Of a task's lines; where a compressed file is larger than a plain one may be to be whole, of its begin too.

    Attributes:
        head: the digest of the lines that start in its first bytes, as the first task of the plain file has it; None
            of a smaller file, or one that is no stream of lines.
    """

    def __init__(self, task: Task, task_bytes: int) -> None:
        self._digest, self._at, self.head = new_digest(), 0, None
        is_stream = task.stop is None and not task.file.endswith(PARQUET_SUFFIX)
        self._until = task_bytes if is_stream else None

    def update(self, line: bytes) -> None:
        if self._until is not None and self._at >= self._until:
            self.head, self._until = self._digest.hexdigest(), None
        self._digest.update(line)
        self._at += len(line)

    def hexdigest(self) -> str:
        return str(self._digest.hexdigest())


_encoders: dict[Path, TextEncoder] = {}


def do(job: Job) -> int:
    """Tokenises a unit into its part, or compares the input of a finished one; returns the number of its bad documents.

    Raises:
        DataError: a bad document that the policy does not set aside; input that is not what the part was made from.
    """
    if job.record is None:
        return _tokenize(job)
    _check_input(job, job.record)
    return 0


def _check_input(job: Job, record: dict[str, Any]) -> None:
    """Raises DataError where a file that a finished part was made from is another one by now."""
    marker = job.target / f"{part_name(job.number)}.json"
    recorded = record.get("input_digests", [record["input_digest"]])
    for task, expected in zip(job.unit.tasks, recorded, strict=True):
        path = job.folder / task.file
        if not touched_since(path, marker):
            continue
        digest = new_digest()
        for _ in read_documents(job.folder, task, digest):
            pass
        if digest.hexdigest() != expected:
            raise DataError(
                f"not what {marker.name} was made from any more",
                file=path,
                remedy=f"bring the old file back, or use another --output, or remove {job.target}",
            )


def _tokenize(job: Job) -> int:
    if job.tokenizer not in _encoders:
        _encoders[job.tokenizer] = TextEncoder(job.tokenizer)
    encoder = _encoders[job.tokenizer]
    base = job.target / part_name(job.number)
    rejected_path = base.with_suffix(".rejected.jsonl")
    tokens = documents = characters = 0
    rejected: list[bytes] = []
    digests: list[_Digest] = []
    documents_of: list[int] = []
    pages, rest = [], b""
    with write_beside(base.with_suffix(".tokens")) as stream, contextlib.ExitStack() as inputs:
        for batch in _batches(_good_texts(job, inputs, rejected, digests, documents_of)):
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
        write_whole(rejected_path, b"".join(rejected))
    manifest = {
        "identity": job.unit.identity(asdict(job.options)),
        "tokens": tokens,
        "documents": documents,
        "characters": characters,
        "rejected": len(rejected),
        "input_digest": digests[0].hexdigest(),
        "pages_digest": pages_digest.hexdigest(),
    }
    if len(digests) > 1:
        each, of_all = [digest.hexdigest() for digest in digests], new_digest()
        of_all.update("".join(each).encode())
        manifest |= {"input_digest": of_all.hexdigest(), "input_digests": each, "input_documents": documents_of}
    heads = {task.file: digest.head for task, digest in zip(job.unit.tasks, digests, strict=True) if digest.head}
    if heads:
        manifest["input_heads"] = heads
    write_whole(base.with_suffix(".json"), canonical_json(sealed(manifest)))
    return len(rejected)


def _good_texts(
    job: Job, inputs: contextlib.ExitStack, rejected: list[bytes], digests: list[_Digest], documents_of: list[int]
) -> Iterator[str]:
    """The texts of a unit's good documents.

    Args:
        inputs: closed when all is read, finds the files as they were.
        rejected: takes the lines for the `.rejected.jsonl`.
        digests, documents_of: take each task's digest, and how many good documents it has.
    """
    for task, size in zip(job.unit.tasks, job.unit.sizes, strict=True):
        inputs.enter_context(unchanged(job.folder / task.file, size))
        digest, documents = _Digest(task, job.options.task_bytes), 0
        for document in read_documents(job.folder, task, digest):
            if document.reason:
                _reject(job, task, document, rejected)
            else:
                documents += 1
                yield document.text
        digests.append(digest)
        documents_of.append(documents)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _reject(job: Job, task: Task, document: Document, rejected: list[bytes]) -> None:
    path = job.folder / task.file
    rejected.append(rejected_line(task.file, document))
    job.policy.set_aside(
        len(rejected),
        "documents",
        document.reason,
        file=path,
        place=document.place,
        mend="mend the document, or set bad ones",
        look="look at the source",
    )
