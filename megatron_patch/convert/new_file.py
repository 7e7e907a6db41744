"""An export of one file, which appears whole or not at all, and never in place of another."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_tools.files.durable import LOCK_NAME, PARTIAL_SUFFIX, folder_lock, fsync_file, fsync_folder
from megatron_patch.convert.source import ConvertError


@contextlib.contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """A folder to write in; its file of that name becomes `file` when the block ends well, the rest goes.

    Raises:
        ConvertError: `file` exists, or the disk is full.
        FolderBusy: another process writes it.
    """
    partial = file.with_name(file.name + PARTIAL_SUFFIX)
    try:
        with folder_lock(partial):
            try:
                if os.path.lexists(file):
                    raise ConvertError(f"{file}: exists; choose a new file or remove this one")
                for left in partial.iterdir():  # by an export that was killed
                    if left.name != LOCK_NAME:
                        left.unlink()
                yield partial
                fsync_file(partial / file.name)
                (partial / file.name).rename(file)
                fsync_folder(file.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:  # some name no file where the disk is full
        raise ConvertError(f"{file}: cannot be written ({error}); free space, or name another") from None
