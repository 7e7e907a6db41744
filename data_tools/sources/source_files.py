"""The files of a source: which hold its documents, what lies beside them, and no text twice."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from data_tools.files.digest import digest_file
from data_tools.files.errors import DataError
from data_tools.files.plain_file import open_plain
from data_tools.sources.compressed import open_decompressed, unpacking_named

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
PARQUET_SUFFIX = ".parquet"
TEXT_FIELDS = ("text", "content")
READ_SUFFIXES = (*JSONL_SUFFIXES, PARQUET_SUFFIX)
LEFT_OUT = "github"
"""RedPajama's github subset is tokenised by the authors' scripts but is not in the mix (paper, Table 2)."""
_DOCUMENTS = re.compile(r".*\.(json|jsonl|jsonlines|ndjson|parquet)([.~_ -].*)?", re.IGNORECASE | re.DOTALL)
"""Names of documents' files, whatever stands behind: another compression, a download's mark, a copy's number."""
_ABOUT = re.compile(
    r".*\.(asc|b2|b2sum|crc|crc32|etag|html?|idx|index|lock|log|md|md5|md5sum|meta|metadata|sha\d*|sha\d*sums?|sig"
    r"|stats|txt|url|xxh\d*)",
    re.IGNORECASE | re.DOTALL,
)
"""What stands behind the name of such a file where another one tells something about it."""
_UNFINISHED = re.compile(
    r".*\.(aria2|crdownload|download|filepart|gstmp|incomplete|opdownload|part|partial|st|temp|tmp|!ut|!qb)",
    re.IGNORECASE | re.DOTALL,
)
_UNFINISHED_HIDDEN = re.compile(r"\..+\.(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{6}|\.azDownload-.*", re.DOTALL)  # rsync, azcopy
_HUB_DOWNLOADS = ".cache/huggingface/download"
_HEAD_BYTES = 1 << 16


def list_files(folder: Path) -> list[Path]:
    """The data files of a source, all levels deep and through links, in the order of their relative paths.

    Raises:
        DataError: there is none, one holds documents in a form that is not read or is not whole, a link leads to a
            folder that is there already, or two files hold one text: by their names, or being one file.
        OSError: a folder cannot be read.
    """
    files = []
    for path in _files(folder):
        if _is_read(path):
            files.append(path)
        else:
            _refuse_documents(path)
    if not files:
        raise DataError(
            f"no {', '.join(READ_SUFFIXES)} file",
            file=folder,
            remedy="--input names the folder that holds the source's files",
        )
    for path in files:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise DataError("the name is not UTF-8, as a manifest must be", file=path, remedy="rename it") from None
    files.sort(key=lambda path: path.relative_to(folder).as_posix())
    _refuse_twins(files)
    return files


def list_left_out(folder: Path) -> list[str]:
    """What of a source is passed over, a sentence a kind: files of another form, LEFT_OUT, what is hidden."""
    beside: list[str] = []
    hidden: list[str] = []
    sentences = []
    for here, folders, names in _walk(folder):
        for name in folders + names:
            where = (here / name).relative_to(folder).as_posix()
            if name == LEFT_OUT and name in folders:
                count = sum(_is_read(Path(file)) for _, _, files in os.walk(here / name) for file in files)
                sentences.append(
                    f"folder {where!r} with {count:,} files of documents is left out: RedPajama's github subset is not"
                    " in the mix (paper, Table 2)"
                )
            elif name.startswith("."):
                if name in folders or _DOCUMENTS.fullmatch(name):
                    hidden.append(where)
            elif name in names and not _is_read(Path(name)):
                beside.append(where)
    if beside:
        sentences.append(f"{len(beside):,} files are neither JSONL nor Parquet and left out: {_some(beside)}")
    if hidden:
        sentences.append(f"{len(hidden):,} hidden files and folders are left out: {_some(hidden)}")
    return sentences


def _some(names: list[str], count: int = 10) -> str:
    return ", ".join(map(ascii, sorted(names)[:count])) + (", ..." if names[count:] else "")


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` through links, hidden folders and LEFT_OUT named but not entered."""
    seen: dict[str, str] = {}
    for here, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        if (same := seen.setdefault(os.path.realpath(here), here)) != here:
            raise DataError(f"is the folder {same} again", file=here, remedy="remove one of them, or the link")
        yield Path(here), list(folders), names
        folders[:] = [name for name in folders if not name.startswith(".") and name != LEFT_OUT]


def _files(folder: Path) -> Iterator[Path]:
    """All files of a source but hidden ones.

    Raises:
        DataError: a hidden one is a download that has not ended.
    """
    for here, folders, names in _walk(folder):
        for name in names:
            if not name.startswith("."):
                yield here / name
            elif _is_unfinished(name):
                raise _unfinished(here / name)
        if ".cache" in folders:
            for path in (here / _HUB_DOWNLOADS).rglob("*.incomplete"):
                raise _unfinished(path)


def _is_unfinished(name: str) -> bool:
    match = _DOCUMENTS.fullmatch(name)
    if match is None or _ABOUT.fullmatch(match[2] or ""):
        return False
    return bool(_UNFINISHED.fullmatch(name) or _UNFINISHED_HIDDEN.fullmatch(name))


def _unfinished(path: Path) -> DataError:
    return DataError(
        "is a download or a copy that has not ended, it seems",
        file=path,
        remedy="let it end, or bring the file anew and remove this",
    )


def _is_read(path: Path) -> bool:
    return path.name.endswith(READ_SUFFIXES)


def _raise(error: OSError) -> None:
    raise error


def _refuse_documents(path: Path) -> None:
    """Raises DataError where a file that is not read holds documents, as its name or its content says."""
    match = _DOCUMENTS.fullmatch(path.name)
    if match is None or _ABOUT.fullmatch(match[2] or ""):
        return
    if _is_unfinished(path.name):
        raise _unfinished(path)
    if match[1].lower() == "json":  # any file of settings; documents are recognised by their fields
        head = _json_head(path)
        if (head or not match[2]) and not _begins_document(head):
            return
    raise DataError(
        f"holds documents, it seems, but only {', '.join(READ_SUFFIXES)} are read",
        file=path,
        remedy="make it one of these (one object a line: .jsonl), or move it out of the source's folder",
    )


def _json_head(path: Path) -> str:
    """The beginning of a JSON file behind what is white; empty where it is no JSON, or packed."""
    with open_plain(path) as stream:
        head = stream.read(_HEAD_BYTES).decode(errors="replace").lstrip("\ufeff \t\r\n")
    return head if head.startswith(("{", "[")) else ""


def _begins_document(head: str) -> bool:
    """Whether JSON's first object, or the first of its list, has a text; `head` may end anywhere."""
    decode, white = json.JSONDecoder().raw_decode, re.compile(r"[\s:,]*")
    at = white.match(head, 1 if head.startswith("[") else 0).end()  # type: ignore[union-attr]
    if head[at : at + 1] != "{":
        return False
    at += 1
    while True:
        try:
            key, at = decode(head, white.match(head, at).end())  # type: ignore[union-attr]
            at = white.match(head, at).end()  # type: ignore[union-attr]
            if key in TEXT_FIELDS and head[at : at + 1] == '"':
                return True
            _, at = decode(head, at)
        except (ValueError, RecursionError, TypeError):  # the end of the object or of `head`
            return False


def _refuse_twins(files: list[Path]) -> None:
    """Raises DataError where two files hold one text: x.jsonl and x.jsonl.gz, or two names of one file."""
    by_stem: dict[tuple[Path, str], Path] = {}
    by_file: dict[tuple[int, int], Path] = {}
    for path in files:
        suffix = next(suffix for suffix in sorted(READ_SUFFIXES, key=len, reverse=True) if path.name.endswith(suffix))
        other = by_stem.setdefault((path.parent, path.name.removesuffix(suffix)), path)
        if other is not path:
            raise DataError(
                f"holds what {other.name} holds, by its name: the text would be read twice",
                file=path,
                remedy="remove one of the two, or rename one if their texts differ",
            )
        if path.exists() and (other := by_file.setdefault(_identity(path), path)) is not path:
            raise DataError(f"is the file {other} by another name", file=path, remedy="remove the link")


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def refuse_shared(folders: Mapping[str, Path]) -> None:
    """Raises DataError where a folder or a file, by whatever name, is in two sources.

    Args:
        folders: of raw text, by source; all that one command reads.
    """
    places = {name: folder.resolve() for name, folder in folders.items()}
    for (name, path), (other, inside) in itertools.permutations(places.items(), 2):
        if inside.is_relative_to(path):
            raise DataError(
                f"lies in {path}, which is {name}", file=inside, place=other, remedy="each source has its own folder"
            )
    by_file: dict[tuple[int, int], tuple[str, Path]] = {}
    for name, folder in folders.items():
        for path in filter(Path.is_file, list_files(folder)):
            other_name, other_path = by_file.setdefault(_identity(path), (name, path))
            if other_path != path:
                raise DataError(
                    f"is the file {other_path} of {other_name}", file=path, place=name, remedy="a text has one source"
                )


def list_copies(folders: Mapping[str, Path]) -> list[str]:
    """A sentence for each file that has the content of another one of its source.

    It may be meant, to weigh a text more. Files of a single document are not compared: a source has its duplicates.

    Raises:
        DataError: one has the content of another source's.
    """
    by_size: dict[tuple[int, str], list[Path]] = defaultdict(list)
    source_of: dict[Path, str] = {}
    for name, folder in folders.items():
        for path in filter(Path.is_file, list_files(folder)):
            by_size[path.stat().st_size, path.suffix].append(path)
            source_of[path] = name
    copies = []
    for (size, _), paths in by_size.items():
        by_head: dict[bytes, list[Path]] = defaultdict(list)
        for path in paths if size and len(paths) > 1 else []:
            with open_plain(path) as stream:
                by_head[stream.read(_HEAD_BYTES)].append(path)
        for same_head in by_head.values():
            by_content: dict[str, Path] = {}
            for path in same_head if len(same_head) > 1 else []:
                other = by_content.setdefault(digest_file(path), path)
                if other is path or not _has_several_documents(path):
                    continue
                if source_of[other] != source_of[path]:
                    raise DataError(
                        f"is a copy of {other} of {source_of[other]}",
                        file=path,
                        place=source_of[path],
                        remedy="a text has one source",
                    )
                copies.append(f"{path} is a copy of {other}: its text is taken twice")
    return copies


def _has_several_documents(path: Path) -> bool:
    if path.suffix == PARQUET_SUFFIX:
        return True
    try:
        with unpacking_named(path, ""), open_decompressed(path) as stream:
            while (piece := stream.readline(1 << 20)) and not piece.endswith(b"\n"):
                pass
            return bool(stream.read(1))
    except DataError:  # said where the documents are read
        return False
