"""JSON records on disk: one way of writing, sealed with their own digest, and errors that name the file."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.files.bounded_json import load_bounded
from data_tools.files.errors import DataError

MOST_MANIFEST_BYTES = 256 << 20
"""A million files of a corpus, at 250 bytes each."""


def canonical_json(value: Any) -> bytes:
    """The one way in which manifests are written: sorted keys, one space of indent, newline at the end."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        DataError: missing file, not JSON, or not an object.
    """
    try:
        value = load_bounded(path, MOST_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("no such file", file=path, remedy=remedy) from None
    except ValueError as error:
        raise DataError(f"not JSON ({error})", file=path, remedy=remedy) from None
    if not isinstance(value, dict):
        raise DataError("not a JSON object", file=path, remedy=remedy)
    return value


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """A manifest with the digest of its own content in its field `digest`."""
    return {**value, "digest": content_digest(value)}


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """A manifest that `sealed` made: what its fields hold is what was written.

    Raises:
        DataError: missing file, not JSON, or changed since.
    """
    value = read_json(path, remedy)
    if value.get("digest") != content_digest(value):
        raise DataError(
            "the content does not match its own digest",
            file=path,
            place="digest",
            remedy="do not edit it: " + remedy,
        )
    return value


@contextlib.contextmanager
def fields_named(path: Path, remedy: str) -> Iterator[None]:
    """Turns what goes wrong with the fields of `path` while they are taken into an error that names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"field missing or of the wrong type: {error}", file=path, remedy=remedy) from None


def content_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, its own `digest` field left out."""
    return hashlib.sha256(canonical_json({k: v for k, v in manifest.items() if k != "digest"})).hexdigest()
