"""Reads a JSONL segment block by block through the C++ core, in bounded memory."""

from __future__ import annotations

import base64
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from data_tools.dataset.format import TOKEN_DTYPE
from data_tools.files.digest import new_digest
from data_tools.files.durable import errors_named
from data_tools.files.errors import DataError, ErrorPolicy
from data_tools.index._core import SLACK_BYTES, SLACK_IDS, RowParser
from data_tools.sources.compressed import open_decompressed, refuse_other_form, unpacking_named

BLOCK_BYTES = 1 << 22  # fewer, larger writes: small ones cost the page cache twice as much a byte
READ_BYTES = 1 << 19  # the digest finds what was read in the second-level cache
LONGEST_LINE = 1 << 26


@dataclass
class _Block:
    """Whole lines, text[:stop]; and what became of them."""

    text: bytearray
    stop: int
    ids: np.ndarray
    codes: np.ndarray
    rows: int = 0
    lines: int = 0
    faults: list[tuple[int, int, str, bytes]] = field(default_factory=list)
    """Line in the block, column, reason, the line itself."""


class SegmentReader:
    """A segment's rows, strictly parsed.

    Attributes:
        rows, lines: good rows and lines so far.
        codes: source codes so far, in blocks.
        rejected: lines for the `.rejected.jsonl` so far.
        digest: running XXH3-128 of the (decompressed) input.
    """

    def __init__(
        self,
        path: Path,
        row_length: int,
        vocab_size: int,
        policy: ErrorPolicy,
        sources: tuple[str, ...],
        threads: int = 1,
        kernel: str = "",
    ) -> None:
        """`sources` in their order: a row's code is a position in it. `kernel` names the parser to use
        (`data_tools.index._core.kernels()`); by default the processor's fastest.
        """
        self.path, self.row_length, self.policy, self.threads = path, row_length, policy, threads
        self.rows = self.lines = 0
        self.codes: list[bytes] = []
        self.rejected: list[bytes] = []
        self.digest = new_digest()
        self._parser = RowParser(row_length, vocab_size, list(sources), kernel)
        self._free: list[_Block] = []

    def blocks(self) -> Iterator[np.ndarray]:
        """The rows' ids, uint16 [n * row_length] at a time; each array is good until the next one is asked for.

        Raises:
            DataError: the first bad row, or one too many; a file that cannot be decompressed.
        """
        with unpacking_named(self.path, "fetch the segment again"), errors_named(self.path), self._open() as stream:
            yield from self._inline(stream) if self.threads == 1 else self._threaded(stream)

    def _open(self) -> BinaryIO:
        if self.path.suffix != ".jsonl":
            return open_decompressed(self.path)
        refuse_other_form(self.path)
        stream = self.path.open("rb", buffering=0)  # blocks are buffers enough: no second copy of every byte
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return cast(BinaryIO, stream)

    def _inline(self, stream: BinaryIO) -> Iterator[np.ndarray]:
        for block in self._read(stream):
            self._parse(block)
            yield self._take(block)
            self._free.append(block)

    def _threaded(self, stream: BinaryIO) -> Iterator[np.ndarray]:
        """Reads and hands out on the calling thread, parses on the others, in order."""
        with ThreadPoolExecutor(self.threads) as pool:
            pending: deque[tuple[_Block, Future[None]]] = deque()
            for block in self._read(stream):
                pending.append((block, pool.submit(self._parse, block)))
                if len(pending) <= self.threads:
                    continue
                first, parsed = pending.popleft()
                parsed.result()
                yield self._take(first)
                self._free.append(first)
            for first, parsed in pending:
                parsed.result()
                yield self._take(first)

    def _new_block(self, size: int) -> _Block:
        rows = size // (2 * self.row_length) + 1  # an id takes two bytes at least, with its comma
        ids = np.empty(rows * self.row_length + SLACK_IDS, dtype=TOKEN_DTYPE)
        return _Block(bytearray(size + SLACK_BYTES), 0, ids, np.empty(rows, dtype=np.uint8))

    def _read(self, stream: BinaryIO) -> Iterator[_Block]:
        """Blocks that end at the end of a line; the last line gets its newline if it has none."""
        rest = b""
        start = 0  # of the block, in bytes of the (decompressed) file
        ended = False
        size = BLOCK_BYTES
        while not ended:
            block = self._free.pop() if self._free else self._new_block(size)
            size = len(block.text) - SLACK_BYTES
            block.text[: len(rest)] = rest
            filled = len(rest)
            with memoryview(block.text) as view:
                while filled < size - 1:  # one byte is kept for a newline
                    piece = view[filled : min(size - 1, filled + READ_BYTES)]
                    count = stream.readinto(piece)  # type: ignore[attr-defined]
                    if not count:
                        ended = True
                        break
                    self.digest.update(piece[:count])
                    filled += count
            if ended and filled and block.text[filled - 1] != ord("\n"):
                block.text[filled] = ord("\n")
                filled += 1
            block.stop = block.text.rfind(b"\n", 0, filled) + 1
            rest = bytes(memoryview(block.text)[block.stop : filled])
            start += block.stop
            if block.stop:
                yield block
            elif not ended:
                size = self._longer(size, start)
                self._free.clear()

    def _longer(self, size: int, line_start: int) -> int:
        if size >= LONGEST_LINE:
            raise DataError(
                f"longer than {LONGEST_LINE} bytes",
                file=self.path,
                place=f"line that starts at byte {line_start}",
                remedy="not a file of rows: --input names a folder of train_000.jsonl, ...",
            )
        return size * 2

    def _parse(self, block: _Block) -> None:
        block.rows = block.lines = at = 0
        block.faults.clear()
        while at < block.stop:
            rows, consumed, lines, column, reason = self._parser.parse(
                block.text, at, block.stop, block.ids[block.rows * self.row_length :], block.codes[block.rows :]
            )
            block.rows += rows
            block.lines += lines
            at += consumed
            if column:
                end = block.text.find(b"\n", at) + 1
                block.lines += 1
                block.faults.append((block.lines, column, reason, bytes(memoryview(block.text)[at : end - 1])))
                at = end
                if not self.policy.quarantine:
                    return

    def _take(self, block: _Block) -> np.ndarray:
        for line, column, reason, content in block.faults:
            self._reject(self.lines + line, column, reason, content)
        self.rows += block.rows
        self.lines += block.lines
        self.codes.append(block.codes[: block.rows].tobytes())
        return block.ids[: block.rows * self.row_length]

    def _reject(self, line: int, column: int, reason: str, content: bytes) -> None:
        place = f"line {line} column {column}"
        if not self.policy.quarantine:
            raise DataError(
                reason,
                file=self.path,
                place=place,
                remedy="mend or fetch the segment again, or set bad rows aside with --on-error quarantine",
            )
        if len(self.rejected) == self.policy.max_rejected:
            raise DataError(
                f"more than {self.policy.max_rejected} bad rows, the last: {reason}",
                file=self.path,
                place=place,
                remedy="fetch the segment again, or raise --max-rejected",
            )
        try:
            text = {"row": content.decode()}
        except UnicodeDecodeError:
            text = {"row_base64": base64.b64encode(content).decode()}
        record = {"line": line, "column": column, "reason": reason, **text}
        self.rejected.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
