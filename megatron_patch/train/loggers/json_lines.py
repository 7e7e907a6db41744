"""RUN/log.jsonl, the record that everything else is drawn from."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.files.durable import full_disk_named, write_beside
from data_tools.files.plain_file import open_plain
from megatron_patch.run.held import Held
from megatron_patch.run.log import DAMAGED, lines_backwards, record_of

_END_BYTES = 1 << 20


class JsonLines:
    """One JSON object a line, flushed line by line."""

    def __init__(self, path: Path, done: int) -> None:
        """Drops what an attempt before logged beyond step `done`, as that is done again.

        Raises DataError, as `write` does, where the disk is full: a run without its log is not the run.
        """
        self.path = path
        _keep_until(done, path)
        self._lines = path.open("ab")
        self._held = Held(path, self._lines.fileno())
        self._size = self._lines.seek(0, os.SEEK_END)

    def write(self, record: Mapping[str, Any]) -> None:
        with full_disk_named(self.path):
            self._size += self._lines.write(json.dumps(record).encode() + b"\n")
            self._lines.flush()

    def missing(self) -> str:
        """That the log, or the end of what was written to it, is no longer at its path; empty where all is."""
        if gone := self._held.missing():
            return gone
        size = os.fstat(self._lines.fileno()).st_size
        return "" if size >= self._size else f"{self.path} was cut from {self._size} to {size} bytes"

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a line that the disk did not take was an error when it was written
            self._lines.close()


def _keep_until(step: int, log: Path) -> None:
    """Drop records of later steps, a last line that a killed process left unfinished, and what is no record.

    A run's log is long and steps grow, so its end alone is read: a MiB, and on to the first record that stays. Into a
    new file: what an attempt before still sends to a service, it reads from the old one.
    """
    if not log.exists():
        return
    with open_plain(log) as old:
        size = old.seek(0, 2)
        head, tail, damaged = 0, [], []
        for end, line in lines_backwards(old):
            try:
                is_kept = record_of(line)["step"] <= step
            except DAMAGED:
                damaged.append(end)
                continue
            if is_kept and size - end > _END_BYTES:
                head = end
                break
            if is_kept:
                tail.append(line + b"\n")
        if head + sum(map(len, tail)) == size:
            return
        for end in reversed(damaged):
            number = _count_lines(old, end)
            print(f"{log}, line {number}: damaged, no record of a step; left out", file=sys.stderr)
        old.seek(0)
        with write_beside(log) as new:
            for block in _blocks(old, head):
                new.write(block)
            new.writelines(reversed(tail))


def _count_lines(stream: BinaryIO, end: int) -> int:
    stream.seek(0)
    return sum(block.count(b"\n") for block in _blocks(stream, end))


def _blocks(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes, or as many as there are."""
    while size and (block := stream.read(min(size, 1 << 22))):
        size -= len(block)
        yield block
