"""No text in two sources: what `tokenize` recorded of their files tells, whatever command each was tokenised by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.files.errors import DataError
from data_tools.files.json_file import fields_named, read_sealed
from data_tools.pack.rows import SOURCE_MANIFEST, SourceRows
from data_tools.pack.units import recorded_inputs


class _Text(NamedTuple):
    source: str
    file: str
    part: str
    place: int | None
    """Of the file in its part, where that was made from several."""


def refuse_shared_text(folder: Path, sources: Sequence[SourceRows]) -> None:
    """Raises DataError where a file of two sources, each under its own name or packed otherwise, has one text.

    Compared are the digests of plain text: of whole files, of the gibibytes of large plain ones, of the first one of
    large compressed ones, of a Parquet file's bytes. Files of a single document are not compared: a source has its
    duplicates.
    """
    by_text: dict[str, _Text] = {}
    for source in sources:
        for digest, text in _texts(folder, source):
            other = by_text.setdefault(digest, text)
            if other.source != text.source and _documents(folder, text) > 1:
                raise DataError(
                    f"{text.file} has the text of {other.file}, which is in {other.source}",
                    file=folder / text.source,
                    remedy="a text has one source: take the file away from one of the two, remove that source's folder"
                    " here and tokenise it again",
                )


def _texts(folder: Path, source: SourceRows) -> Iterator[tuple[str, _Text]]:
    with fields_named(folder / source.name / SOURCE_MANIFEST, "run tokenize again"):
        for part in source.manifest["parts"]:
            name, file = part["name"], part.get("file", part["name"])
            if "files" not in part:
                yield part["input_digest"], _Text(source.name, file, name, None)
                for digest in part.get("input_heads", {}).values():
                    yield digest, _Text(source.name, file, name, None)
                continue
            record = _record(folder / source.name, name)
            files = [entry.file for entry in recorded_inputs(record)]
            for place, (packed, digest) in enumerate(zip(files, record["input_digests"], strict=True)):
                yield digest, _Text(source.name, packed, name, place)
                if packed in record.get("input_heads", {}):
                    yield record["input_heads"][packed], _Text(source.name, packed, name, place)


def _record(folder: Path, part: str) -> dict[str, Any]:
    return read_sealed(folder / f"{part}.json", "run tokenize again")


def _documents(folder: Path, text: _Text) -> int:
    """How many a file has; 0 where its record is of before they were counted file by file."""
    record = _record(folder / text.source, text.part)
    with fields_named(folder / text.source / f"{text.part}.json", "run tokenize again"):
        if text.place is None:
            return int(record["documents"])
        return int(record["input_documents"][text.place]) if "input_documents" in record else 0
