"""The bytes of a plain, gz or zst file as one stream, in bounded memory; what cannot be read so has its remedy."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from data_tools.files.errors import DataError
from data_tools.files.plain_file import open_plain

LARGEST_WINDOW = 1 << 27
"""Bytes that a zst file may ask its reader to keep: what `zstd -d` grants without being told otherwise."""
_MEGABYTE = 1 << 20
_PACKED = {  # first bytes of forms that are taken for text where a name is wrong
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"PAR1": "Parquet",
}
_NO_JSONL = {
    b"version https://git-lfs": ("a pointer of Git LFS", "git lfs pull brings the file itself"),
    b"<!doctype": ("a web page", "fetch the file itself: such a page asks for a sign-in, or says that there is none"),
    b"<html": ("a web page", "fetch the file itself: such a page asks for a sign-in, or says that there is none"),
    b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 OLD > NEW makes a file that is read"),
    b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 OLD > NEW makes a file that is read"),
}


@contextlib.contextmanager
def unpacking_named(path: Path, remedy: str) -> Iterator[None]:
    """Turns what goes wrong while the block unpacks `path` into an error that names it; `remedy` is for damage."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"cannot decompress: {error}", file=path, remedy=remedy) from None


def open_decompressed(path: Path) -> BinaryIO:
    """The bytes of a plain, gz or zst file, as one stream; read it inside `unpacking_named`.

    Raises:
        DataError: the content is of another form than the name says, or (while it is read) a sound zst file needs a
            dictionary or more memory than LARGEST_WINDOW.
    """
    refuse_other_form(path)
    if path.name.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.name.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(path), 1 << 20)
    return path.open("rb", buffering=1 << 20)


def refuse_other_form(path: Path) -> None:
    """Raises DataError where the first bytes of a JSONL file are of another form than its name says.

    Raises:
        EOFError: the name says that it is compressed, and it is empty.
    """
    with open_plain(path) as stream:
        head = stream.read(32)
    named = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix, "plain text")
    if not head:
        if named == "plain text":
            return
        raise EOFError("the file is empty")
    found = next((form for magic, form in _PACKED.items() if head.startswith(magic)), None)
    if found is None and head.lstrip()[:1] in (b"{", b"["):
        found = "plain text"
    if found is not None and found != named:
        raise DataError(
            f"is {found}, its name says {named}",
            file=path,
            remedy="rename it to what it is: .jsonl, .jsonl.gz, .jsonl.zst, .parquet; another form must be unpacked",
        )
    if other := next((what for begin, what in _NO_JSONL.items() if head.lstrip().lower().startswith(begin)), None):
        raise DataError(f"is {other[0]}, no file of documents", file=path, remedy=other[1])


class _ZstdStream(io.RawIOBase):
    """All frames of a zst file; a file that ends inside a frame is an error, which zstandard's reader lets pass."""

    READ_BYTES = 1 << 12  # four bytes can stand for 128 KiB, so this much for 128 MiB, which are held at once

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("rb")
        self._decompressor = self._new_frame()
        self._ready = memoryview(b"")
        self._inside_frame = False

    @staticmethod
    def _new_frame() -> Any:
        return zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._file.read(self.READ_BYTES)
            if not block:
                if self._inside_frame:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            self._feed(block)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _feed(self, block: bytes) -> None:
        pieces = []
        while block:
            begins, self._inside_frame = not self._inside_frame, True
            try:
                pieces.append(self._decompressor.decompress(block))
            except zstandard.ZstdError as error:
                if begins:
                    self._name_sound_frame(block, str(error))
                raise
            block = b""
            if self._decompressor.eof:
                block = self._decompressor.unused_data
                self._decompressor = self._new_frame()
                self._inside_frame = False
        self._ready = memoryview(b"".join(pieces))

    def _name_sound_frame(self, block: bytes, said: str) -> None:
        """Raises DataError where a frame is not damaged, but asks for more than is granted here."""
        if "too much memory" in said:
            window = zstandard.get_frame_parameters(block).window_size
            raise DataError(
                f"is packed with a window of {window // _MEGABYTE:,} MiB, which every reader must hold;"
                f" up to {LARGEST_WINDOW // _MEGABYTE} MiB are read",
                file=self._path,
                remedy="pack it anew: zstd -d --long=31 --memory=4096MB -c OLD | zstd -o NEW",
            ) from None
        if "Dictionary" in said:
            raise DataError(
                "is packed with a dictionary, which is not in the file",
                file=self._path,
                remedy="pack it anew without: zstd -d -D DICTIONARY -c OLD | zstd -o NEW",
            ) from None

    def close(self) -> None:
        self._file.close()
        super().close()
