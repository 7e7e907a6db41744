"""RUN/log.jsonl, the record that everything else is drawn from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_tools.files.durable import full_disk_named, write_whole
from megatron_patch.run.log import records


class JsonLines:
    """One JSON object a line, flushed line by line."""

    def __init__(self, path: Path, done: int) -> None:
        """Drops what an attempt before logged beyond step `done`, as that is done again.

        Raises DataError, as `write` does, where the disk is full: a run without its log is not the run.
        """
        self.path = path
        _keep_until(done, path)
        self._lines = path.open("ab")

    def write(self, record: Mapping[str, Any]) -> None:
        with full_disk_named(self.path):
            self._lines.write(json.dumps(record).encode() + b"\n")
            self._lines.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a line that the disk did not take was an error when it was written
            self._lines.close()


def _keep_until(step: int, lines: Path) -> None:
    """Drop records of later steps, a last line that a killed process left unfinished, and what is no record."""
    if not lines.exists():
        return
    kept = [json.dumps(record) + "\n" for record in records(lines) if record["step"] <= step]
    write_whole(lines, "".join(kept).encode())
