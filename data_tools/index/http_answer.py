"""What a server's answer says of a file, and the answers that are not the file: refused before a byte is kept."""

from __future__ import annotations

import email.utils
import re
import time
import urllib.request
from dataclasses import dataclass
from email.message import Message
from typing import IO, Any

from data_tools.files.errors import DataError
from data_tools.index.jsonl_segments import JSONL_NAME

SHA256 = re.compile(r"[0-9a-f]{64}")
_OTHER_TYPES = re.compile(r"(text/html|application/xhtml\+xml|(text|application)/xml|(multipart|image|audio|video)/.*)")
LONGEST_WAIT_S = 3600.0


@dataclass
class Stated:
    """What a server says about a file: size and SHA-256 where known, and the tag of this version."""

    size: int | None = None
    sha256: str | None = None
    tag: str | None = None


class KeepLinkedHeaders(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps the headers that only the first answer has."""

    def __init__(self, stated: Stated) -> None:
        self.stated = stated

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        read_headers(headers, self.stated, linked_only=True)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def read_headers(headers: Message, stated: Stated, linked_only: bool = False) -> None:
    """Adds what an answer's headers say to `stated`. A SHA-256 is what the hub links; another server's tag is a tag."""
    linked = (headers.get("X-Linked-Etag") or "").strip('"')
    own = "" if linked_only else headers.get("ETag") or headers.get("Last-Modified") or ""
    stated.tag = stated.tag or linked or own.strip('"') or None
    if SHA256.fullmatch(linked):
        stated.sha256 = stated.sha256 or linked
    if (size := headers.get("X-Linked-Size", "")).isdecimal():
        stated.size = int(size)


def refuse_other_body(response: Any, url: str, whole_is_known: bool) -> None:
    """Refuses an answer whose body is not the file as it is.

    Args:
        whole_is_known: a checksum or a size that is known already will say whether the body is whole.

    Raises:
        DataError: no content, another encoding or type, or a length that nothing tells.
    """
    headers: Message = response.headers
    remedy = "open the address in a browser: it may want a sign-in, or another address"
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    transfer = headers.get("Transfer-Encoding", "").strip().lower()
    kind = headers.get_content_type() if "Content-Type" in headers else ""
    if response.status not in (200, 206):
        raise DataError(f"the server answers {response.status} {response.reason}, no file", file=url, remedy=remedy)
    if encoding not in ("", "identity") or transfer not in ("", "chunked", "identity"):
        packed = encoding if encoding not in ("", "identity") else transfer
        raise DataError(
            f"the server sends it packed ({packed}), which was not asked for",
            file=url,
            remedy="fetch from a server that sends the file as it is, or fetch, unpack and index it by hand",
        )
    if _OTHER_TYPES.fullmatch(kind):
        raise DataError(f"the server sends {kind}, not the file", file=url, remedy=remedy)
    if headers.get("Content-Length", "").strip() == "0":
        raise DataError("the server sends an empty file", file=url, remedy=remedy)
    ends = "Content-Length" in headers or transfer == "chunked" or "Content-Range" in headers
    if not ends and not whole_is_known:
        raise DataError(
            "the server does not say how long it is, so a part would be taken for the whole",
            file=url,
            remedy="name its checksum with --checksums, or fetch from another server",
        )


def refuse_other_content(name: str, beginning: bytes, url: str, is_whole: bool) -> None:
    """Refuses what cannot be the file, whatever type the server gave it; `is_whole`: the beginning is all of it.

    Raises:
        DataError: it is empty, JSON does not begin as JSON, or a segment with a row: an error told in JSON does.
    """
    if not beginning:
        raise DataError("the server sends an empty file", file=url, remedy="check the address")
    if not name.endswith((".jsonl", ".json")):
        return
    kind = "JSON object"
    if beginning.lstrip(b" \t\r\n\xef\xbb\xbf").startswith(b"{"):
        line, newline, _ = beginning.partition(b"\n")
        is_segment = JSONL_NAME.fullmatch(name) is not None
        if not is_segment or not (newline or is_whole) or b'"token_ids"' in line:
            return
        kind = "row of a segment"
    raise DataError(
        f"begins with {beginning[:40]!r}, which is no {kind}",
        file=url,
        remedy="open the address in a browser: it may want a sign-in, or hold the file packed",
    )


def asked_to_wait(headers: Message) -> float | None:
    """Seconds that `Retry-After` asks for, as a number or a date; None where it asks for nothing that makes sense."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
