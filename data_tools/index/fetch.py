"""`fetch`: the published segments and their tokenizer, from a machine with internet; resumable and checksummed.

A file goes to `NAME.partial` and on from its end after an interruption (HTTP Range, with the server's entity tag or
date, so that a file that changed in between is begun anew). What a `--checksums` list says binds: every file must be in
it, one that is there from an earlier fetch too. Without a list the SHA-256 that the server links (Hugging Face:
`X-Linked-Etag`) is compared. A file takes its name when it is checked, and `train_000.json` keeps what `index` needs.

`huggingface_hub` (read at 2.4.0) does not do the transfer, a hub's address included: it compares the size of what came
and not its SHA-256, puts the file under its name before anybody can check it, obeys a Retry-After in seconds alone, and
takes a body of any type.
"""

from __future__ import annotations

import hashlib
import http.client
import itertools
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.dataset.format import tokenizer_name
from data_tools.dataset.segment_files import chosen_segments, segments_lock, tokenizer_lock
from data_tools.files.digest import digest_file, new_digest
from data_tools.files.durable import full_disk_named, partial_path, publish, touched_since, write_whole
from data_tools.files.errors import DataError
from data_tools.files.json_file import canonical_json, read_json
from data_tools.files.progress import Progress
from data_tools.index.http_answer import (
    LONGEST_WAIT_S,
    KeepLinkedHeaders,
    Stated,
    asked_to_wait,
    read_headers,
    refuse_other_body,
    refuse_other_content,
)
from data_tools.index.jsonl_segments import jsonl_name

BLOCK_BYTES = 1 << 20
TIMEOUT_S = 60.0
NO_FILE = (400, 401, 403, 404, 405, 406, 410, 451)
"""Answers that another attempt would not change."""


@dataclass
class Fetcher:
    """Fetches files into a folder.

    Attributes:
        checksums: SHA-256 by file name (checksums.py); where there are some, a file that is not among them is refused.
        allow_unlisted: such files are taken all the same, and their record says so.
        tries: attempts without progress before the run stops; one that brings bytes refills them.
        pause_s: wait before the second attempt; doubled each time.
        unvouched: names of the files so far that no checksum vouches for.
    """

    output: Path
    checksums: dict[str, str] = field(default_factory=dict)
    allow_unlisted: bool = False
    tries: int = 6
    pause_s: float = 1.0
    unvouched: list[str] = field(default_factory=list)

    def expected(self, url: str, name: str) -> str | None:
        """The listed SHA-256 of a file, by its name here or where it comes from.

        Raises:
            DataError: there is a list, and the file is not in it.
        """
        there = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
        found = self.checksums.get(name, self.checksums.get(there))
        if found is None and self.checksums and not self.allow_unlisted:
            raise DataError(
                "is not in the list of --checksums",
                file=name,
                remedy="add its line, or take it without one with --allow-unlisted",
            )
        return found

    def fetch(self, url: str, name: str) -> None:
        """Brings one file; does nothing where an earlier run has brought it.

        Raises:
            DataError: the server does not have it, keeps failing, or sends other bytes than the checksum says.
        """
        path = self.output / name
        expected = self.expected(url, name)
        marker = path.with_suffix(".json") if path.suffix == ".jsonl" else path.with_name(f"{name}.fetched.json")
        if marker.is_file() and path.is_file():
            record = read_json(marker, "remove it and fetch again")
            same = record.get("url") == url and path.stat().st_size == record.get("bytes")
            if same and touched_since(path, marker):
                same = record.get("digests") == {"jsonl": digest_file(path)}
            if same:
                self._accept(path, marker, record, expected)
                return
        elif path.is_file() and path.with_name(f"{name}.tag").is_file() and not partial_path(path).exists():
            path.replace(partial_path(path))  # whole, then killed before the marker
        stated = self._persist(url, path, expected)
        self._check_and_publish(url, path, marker, stated, expected)

    def _accept(self, path: Path, marker: Path, record: dict[str, Any], expected: str | None) -> None:
        """Compares a file of an earlier fetch with the list of this one.

        Raises:
            DataError: the list says another SHA-256.
        """
        if expected is not None and record.get("sha256") != expected:
            raise DataError(
                f"is there from an earlier fetch with SHA-256 {record.get('sha256')}, --checksums says {expected}",
                file=path,
                remedy=f"correct the list, or remove {path.name} and {marker.name} to fetch it again",
            )
        if expected is not None and record.get("checked_by") != "checksums":
            write_whole(marker, canonical_json({**record, "checked": True, "checked_by": "checksums"}))
        elif not record.get("checked"):
            self.unvouched.append(path.name)

    def _persist(self, url: str, path: Path, expected: str | None) -> Stated:
        """Transfers until the file is whole, as long as attempts bring something or are asked to wait."""
        partial = partial_path(path)
        most = partial.stat().st_size if partial.is_file() else 0
        attempt, waited = 0, 0.0
        while True:
            try:
                return self._transfer(url, path, expected)
            except DataError:
                raise
            except (ValueError, http.client.InvalidURL) as error:
                raise DataError(f"not an address: {error}", file=url, remedy="check the address") from None
            except (OSError, http.client.HTTPException) as error:
                asked = asked_to_wait(error.headers) if isinstance(error, urllib.error.HTTPError) else None
                if isinstance(error, urllib.error.HTTPError):
                    if error.code in NO_FILE:
                        raise DataError(
                            f"the server answers {error.code} {error.reason}", file=url, remedy="check the address"
                        ) from None
                elif isinstance(error, OSError) and error.filename:  # a file here: trying again would not help
                    raise
                have = partial.stat().st_size if partial.is_file() else 0
                if have > most:
                    most, attempt, waited = have, 0, 0.0
                elif asked is None:
                    attempt += 1
                pause = max(asked or 0.0, self.pause_s * 2 ** max(attempt - 1, 0))
                waited += pause if asked is not None else 0.0
                if attempt == self.tries or waited > LONGEST_WAIT_S:
                    tried = f"{attempt} attempts failed" if asked is None else f"it asks to wait {asked:.0f} s more"
                    raise DataError(
                        f"{tried}, the last: {error}",
                        file=url,
                        remedy="run the same command again, later: it goes on where it stopped",
                    ) from None
                if pause > 5:
                    print(f"{path.name}: {error}; again in {pause:.0f} s", file=sys.stderr)
                time.sleep(pause)

    def _transfer(self, url: str, path: Path, expected: str | None) -> Stated:
        """Brings the rest of a file into its partial file."""
        partial, tag_path = partial_path(path), path.with_name(f"{path.name}.tag")
        stated = Stated()
        opener = urllib.request.build_opener(KeepLinkedHeaders(stated))
        have = partial.stat().st_size if partial.is_file() and tag_path.is_file() else 0
        request = urllib.request.Request(url)
        if have:
            request.add_header("Range", f"bytes={have}-")
        try:
            response = opener.open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:
                read_headers(error.headers, stated)
                same = stated.tag is None or tag_path.read_bytes() == stated.tag.encode()
                if same and error.headers.get("Content-Range") == f"bytes */{have}":
                    return stated  # all of it was there, only not checked yet
                partial.unlink()  # the file is another one now: begin anew
            raise
        with response:
            read_headers(response.headers, stated)
            checked = expected or stated.sha256
            refuse_other_body(response, url, whole_is_known=bool(checked) or stated.size is not None)
            same = tag_path.read_bytes() == stated.tag.encode() if have and stated.tag else bool(checked)
            begins = response.headers.get("Content-Range", f"bytes {have}-").startswith(f"bytes {have}-")
            goes_on = response.status == 206 and have and same and begins
            if response.status == 206 and not goes_on:
                partial.unlink(missing_ok=True)  # another version: its beginning is needed too
                raise OSError("the file changed on the server")
            if not goes_on:
                have = 0
                write_whole(tag_path, (stated.tag or "").encode())
            blocks = _blocks(response)
            first = next(blocks, b"")
            length = response.headers.get("Content-Length", "")
            stated.size = stated.size if stated.size is not None else have + int(length) if length.isdigit() else None
            if not have and (first or not stated.size):
                refuse_other_content(path.name, first, url, is_whole=len(first) == stated.size)
            progress = Progress(f"fetch {path.name}", stated.size or 0, "B")
            progress.advance(have)
            with partial.open("ab" if have else "wb") as stream, progress:
                for block in itertools.chain((first,), blocks):
                    with full_disk_named(path):
                        stream.write(block)
                    progress.advance(len(block))
        if stated.size is not None and partial.stat().st_size < stated.size:
            raise OSError(f"the connection ended after {partial.stat().st_size} of {stated.size} bytes")
        return stated

    def _check_and_publish(self, url: str, path: Path, marker: Path, stated: Stated, listed: str | None) -> None:
        partial = partial_path(path)
        sha256, xxh3 = hashlib.sha256(), new_digest()
        with partial.open("rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                sha256.update(block)
                xxh3.update(block)
        expected = listed or stated.sha256
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
            "checked_by": "checksums" if listed else "server" if stated.sha256 else None,
            "digests": {"jsonl": xxh3.hexdigest()},
        }
        write_whole(marker, canonical_json(record))
        path.with_name(f"{path.name}.tag").unlink(missing_ok=True)
        if expected is None:
            self.unvouched.append(path.name)


def _blocks(response: Any) -> Iterator[bytes]:
    while block := response.read(BLOCK_BYTES):
        yield block


def fetch_segments(
    address: str,
    tokenizer: str | None,
    output: Path,
    num_segments: int,
    segments: range | None,
    checksums: dict[str, str],
    allow_unlisted: bool = False,
) -> list[str]:
    """Fetches segments (all `num_segments` where None are named) and the tokenizer into `output`.

    Returns:
        The names of the files that no checksum vouches for.

    Raises:
        DataError: an address that is none, a segment that is none, or a file that `checksums` does not list; see
            `Fetcher.fetch`.
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
        fetcher = Fetcher(output, checksums, allow_unlisted)
        files = [(f"{address.rstrip('/')}/{jsonl_name(segment)}", jsonl_name(segment)) for segment in wanted]
        its_name = tokenizer_name(Path(urllib.parse.urlsplit(tokenizer).path)) if tokenizer else ""
        for url, name in (*files, *([(tokenizer, its_name)] if tokenizer else [])):
            fetcher.expected(url, name)  # before the first of terabytes
        if tokenizer:
            with tokenizer_lock(output):
                fetcher.fetch(tokenizer, its_name)
        for url, name in files:
            fetcher.fetch(url, name)
    return fetcher.unvouched
