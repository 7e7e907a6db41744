"""A server on loopback with the faults of real ones."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@dataclass
class Site:
    """Files and the faults that a server shows."""

    files: dict[str, bytes] = field(default_factory=dict)
    address: str = ""
    cut_after: list[int] = field(default_factory=list)
    """Bytes after which the next answers break off."""
    ranges: list[str | None] = field(default_factory=list)
    """The Range headers of the requests, in order."""
    linked: bool = False
    """Answers like Hugging Face: a redirect whose headers hold the SHA-256."""
    answers: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)
    """What the next requests get, whatever they ask for."""


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/linked").removeprefix("/")
            if name not in site.files:
                self.send_error(404)
                return
            content = site.files[name]
            digest = hashlib.sha256(content).hexdigest()
            if site.linked and not self.path.startswith("/linked"):
                self.send_response(302)
                self.send_header("Location", f"/linked/{name}")
                self.send_header("X-Linked-Etag", f'"{digest}"')
                self.send_header("X-Linked-Size", str(len(content)))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            wanted = self.headers.get("Range")
            site.ranges.append(wanted)
            if site.answers:
                code, headers, body = site.answers.pop(0)
                self.send_response(code)
                for header in headers.items():
                    self.send_header(*header)
                self.end_headers()
                self.wfile.write(body)
                return
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            if start >= len(content) > 0:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206 if wanted else 200)
            self.send_header("ETag", f'"v-{digest[:8]}"')
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            cut = site.cut_after.pop(0) if site.cut_after else len(content)
            self.wfile.write(content[start : start + cut])

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.address = f"http://127.0.0.1:{server.server_port}"
    yield site
    server.shutdown()
    thread.join()
    server.server_close()
