"""Digests of files: XXH3-128 for data, SHA-256 for what is small and named by its content."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from data_tools.files.plain_file import open_plain, read_plain


def new_digest() -> Any:
    """A running XXH3-128 digest: `.update(bytes)`, `.hexdigest()`."""
    return xxhash.xxh3_128()


def digest_file(path: Path, block_bytes: int = 1 << 22) -> str:
    """XXH3-128 of a file's bytes, in hexadecimal."""
    digest = new_digest()
    with open_plain(path) as stream:
        digest_stream(stream, digest, block_bytes)
    return str(digest.hexdigest())


def digest_stream(stream: BinaryIO, digest: Any, block_bytes: int = 1 << 22) -> None:
    """Adds the rest of `stream` to `digest`."""
    buffer = memoryview(bytearray(block_bytes))
    while count := stream.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:count])


def sha256_file(path: Path) -> str:
    """SHA-256 of a small file's bytes (tokenizers), in hexadecimal."""
    return hashlib.sha256(read_plain(path)).hexdigest()
