"""`fetch`: the published segments and their tokenizer, from a machine with internet; resumable and checksummed.

A file goes to `NAME.partial` and on from its end after an interruption (HTTP Range, with the server's entity tag or
date, so that a file that changed in between is begun anew). The SHA-256 that the server states for it (Hugging Face:
`X-Linked-Etag`) or a `--checksums` file states is checked before the file takes its name, and `train_000.json` keeps
what `index` needs.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import IO, Any

from data_tools.dataset.format import tokenizer_name
from data_tools.dataset.segment_files import chosen_segments, segments_lock, tokenizer_lock
from data_tools.files.digest import digest_file, new_digest
from data_tools.files.durable import full_disk_named, partial_path, publish, touched_since, write_whole
from data_tools.files.errors import DataError
from data_tools.files.json_file import canonical_json, read_json
from data_tools.files.progress import Progress
from data_tools.index.jsonl_segments import jsonl_name

BLOCK_BYTES = 1 << 20
TIMEOUT_S = 60.0
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class _Stated:
    """What a server says about a file: size and SHA-256 where known, and the tag of this version."""

    size: int | None = None
    sha256: str | None = None
    tag: str | None = None


class _KeepLinkedHeaders(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps the headers that only the first answer has."""

    def __init__(self, stated: _Stated) -> None:
        self.stated = stated

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        _read_headers(headers, self.stated, linked_only=True)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _read_headers(headers: Message, stated: _Stated, linked_only: bool = False) -> None:
    own = "" if linked_only else headers.get("ETag") or headers.get("Last-Modified")
    tag = (headers.get("X-Linked-Etag") or own or "").strip('"')
    stated.tag = stated.tag or tag or None
    if SHA256.fullmatch(tag):
        stated.sha256 = stated.sha256 or tag
    if (linked_size := headers.get("X-Linked-Size", "")).isdigit():
        stated.size = int(linked_size)


@dataclass
class Fetcher:
    """Fetches files into a folder.

    Attributes:
        checksums: SHA-256 by file name, from a file in the form of `sha256sum`.
        tries: attempts a file before the run stops.
        pause_s: wait before the second attempt; doubled each time.
    """

    output: Path
    checksums: dict[str, str] = field(default_factory=dict)
    tries: int = 6
    pause_s: float = 1.0

    def fetch(self, url: str, name: str) -> None:
        """Brings one file; does nothing where an earlier run has brought it.

        Raises:
            DataError: the server does not have it, keeps failing, or sends other bytes than the checksum says.
        """
        path = self.output / name
        marker = path.with_suffix(".json") if path.suffix == ".jsonl" else path.with_name(f"{name}.fetched.json")
        if marker.is_file() and path.is_file():
            record = read_json(marker, "remove it and fetch again")
            same = record.get("url") == url and path.stat().st_size == record.get("bytes")
            if same and touched_since(path, marker):
                same = record.get("digests") == {"jsonl": digest_file(path)}
            if same:
                return
        elif path.is_file() and path.with_name(f"{name}.tag").is_file() and not partial_path(path).exists():
            path.replace(partial_path(path))  # whole, then killed before the marker
        for attempt in range(self.tries):
            try:
                stated = self._transfer(url, path)
                break
            except DataError:
                raise
            except (ValueError, http.client.InvalidURL) as error:
                raise DataError(f"not an address: {error}", file=url, remedy="check the address") from None
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError):
                    if error.code in (401, 403, 404, 410):
                        raise DataError(
                            f"the server answers {error.code} {error.reason}", file=url, remedy="check the address"
                        ) from None
                elif isinstance(error, OSError) and error.filename:  # a file here: trying again would not help
                    raise
                if attempt + 1 == self.tries:
                    raise DataError(
                        f"{self.tries} attempts failed, the last: {error}",
                        file=url,
                        remedy="run the same command again: it goes on where it stopped",
                    ) from None
                time.sleep(self.pause_s * 2**attempt)
        self._check_and_publish(url, path, marker, stated)

    def _transfer(self, url: str, path: Path) -> _Stated:
        """Brings the rest of a file into its partial file."""
        partial, tag_path = partial_path(path), path.with_name(f"{path.name}.tag")
        stated = _Stated()
        opener = urllib.request.build_opener(_KeepLinkedHeaders(stated))
        have = partial.stat().st_size if partial.is_file() and tag_path.is_file() else 0
        request = urllib.request.Request(url)
        if have:
            request.add_header("Range", f"bytes={have}-")
        try:
            response = opener.open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:
                _read_headers(error.headers, stated)
                same = stated.tag is None or tag_path.read_bytes() == stated.tag.encode()
                if same and error.headers.get("Content-Range") == f"bytes */{have}":
                    return stated  # all of it was there, only not checked yet
                partial.unlink()  # the file is another one now: begin anew
            raise
        with response:
            _read_headers(response.headers, stated)
            checked = path.name in self.checksums or stated.sha256
            same = tag_path.read_bytes() == stated.tag.encode() if have and stated.tag else bool(checked)
            begins = response.headers.get("Content-Range", f"bytes {have}-").startswith(f"bytes {have}-")
            goes_on = response.status == 206 and have and same and begins
            if response.status == 206 and not goes_on:
                partial.unlink(missing_ok=True)  # another version: its beginning is needed too
                raise OSError("the file changed on the server")
            if not goes_on:
                have = 0
                write_whole(tag_path, (stated.tag or "").encode())
            length = response.headers.get("Content-Length", "")
            stated.size = stated.size if stated.size is not None else have + int(length) if length.isdigit() else None
            progress = Progress(f"fetch {path.name}", stated.size or 0, "B")
            progress.advance(have)
            with partial.open("ab" if have else "wb") as stream, progress:
                for block in _blocks(response):
                    with full_disk_named(path):
                        stream.write(block)
                    progress.advance(len(block))
        if stated.size is not None and partial.stat().st_size < stated.size:
            raise OSError(f"the connection ended after {partial.stat().st_size} of {stated.size} bytes")
        return stated

    def _check_and_publish(self, url: str, path: Path, marker: Path, stated: _Stated) -> None:
        partial = partial_path(path)
        sha256, xxh3 = hashlib.sha256(), new_digest()
        with partial.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                sha256.update(block)
                xxh3.update(block)
        expected = self.checksums.get(path.name, stated.sha256)
        size = partial.stat().st_size
        if (expected is not None and sha256.hexdigest() != expected) or stated.size not in (None, size):
            partial.unlink()
            raise DataError(
                f"{size} bytes with SHA-256 {sha256.hexdigest()}, expected {stated.size} with {expected}",
                file=path,
                remedy="run the same command again: the file is fetched anew",
            )
        publish(path)
        record = {
            "url": url,
            "bytes": size,
            "sha256": sha256.hexdigest(),
            "checked": expected is not None,
            "digests": {"jsonl": xxh3.hexdigest()},
        }
        write_whole(marker, canonical_json(record))
        path.with_name(f"{path.name}.tag").unlink(missing_ok=True)


def _blocks(response: Any) -> Iterator[bytes]:
    while block := response.read(BLOCK_BYTES):
        yield block


def read_checksums(path: Path) -> dict[str, str]:
    """SHA-256 by file name from the output of `sha256sum`.

    Raises:
        DataError: a line is not of that form.
    """
    checksums = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        digest, _, name = line.partition(" ")
        if not SHA256.fullmatch(digest) or not name:
            raise DataError(
                "not a line of sha256sum", file=path, place=f"line {number}", remedy="use sha256sum's output"
            )
        checksums[Path(name.lstrip(" *")).name] = digest
    return checksums


def fetch_segments(
    address: str,
    tokenizer: str | None,
    output: Path,
    num_segments: int,
    segments: range | None,
    checksums: dict[str, str],
) -> None:
    """Fetches segments (all `num_segments` where None are named) and the tokenizer into `output`.

    Raises:
        DataError: an address that is none, or a segment that is none; see `Fetcher.fetch`.
    """
    for url in filter(None, (address, tokenizer)):
        try:
            scheme = urllib.parse.urlsplit(url).scheme
        except ValueError:
            scheme = ""
        if scheme not in ("http", "https"):
            raise DataError("not an address that begins with https://", file=url, remedy="check the address")
    wanted = chosen_segments(segments, num_segments, output)
    with segments_lock(output, segments):
        fetcher = Fetcher(output, checksums)
        if tokenizer:
            with tokenizer_lock(output):
                fetcher.fetch(tokenizer, tokenizer_name(Path(urllib.parse.urlsplit(tokenizer).path)))
        for segment in wanted:
            fetcher.fetch(f"{address.rstrip('/')}/{jsonl_name(segment)}", jsonl_name(segment))
