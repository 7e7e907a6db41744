"""A hub on the loopback with the API that huggingface_hub and datasets speak: information, trees, files.

Weights and parquet files lie behind a redirect under their SHA-256, as on the hub; small files come directly under the
SHA-1 that git gives them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_ROOT = Path(__file__).parents[2]
_LARGE = (".parquet", ".safetensors")
_ROUTE = re.compile(
    r"/api/(?P<api>datasets|models)/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/(?P<at>[^/]+)"
    r"(?:/(?P<under>.*))?)?"
    r"|/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
    r"|/cdn/(?P<digest>[0-9a-f]{64})"
)


@dataclass(frozen=True)
class _File:
    content: bytes
    path: str

    @property
    def is_large(self) -> bool:
        return self.path.endswith(_LARGE)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def entry(self) -> dict[str, Any]:
        entry = {"type": "file", "oid": self.oid, "size": len(self.content), "path": self.path}
        if self.is_large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass
class Hub:
    """Serves repositories from memory while its block lasts; `url` is what HF_ENDPOINT takes.

    Attributes:
        repositories: "datasets/ORG/NAME" or "models/ORG/NAME" -> path -> content.
        fetched: the large files that were asked for, ORG/NAME/PATH, in order.
        cut: files whose connection is cut half-way, each as often as it stands here.
        damage: files of which a byte is changed on the way.
        stop_after: after so many large files the next one hangs, and `stopped` is set.
    """

    repositories: dict[str, dict[str, bytes]]
    fetched: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    damage: set[str] = field(default_factory=set)
    stop_after: int | None = None
    stopped: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Hub:
        hub = self
        self.files = {
            name: {path: _File(content, path) for path, content in files.items()}
            for name, files in self.repositories.items()
        }
        self.by_digest = {
            f.sha256: (name, f) for name, files in self.files.items() for f in files.values() if f.is_large
        }

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Another host than the hub, as there: huggingface_hub follows redirects to the same host alone for the headers.
        self.cdn = f"http://localhost:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def start(self, home: Path, *arguments: str | Path) -> subprocess.Popen[str]:
        """`python -m ...` in a process whose hub is this one and whose cache is `home`."""
        environment = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
        environment |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)],
            cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def evaluate(self, home: Path, *arguments: str | Path) -> tuple[int, str]:
        """Exit code and messages of `eval`."""
        process = self.start(home, "megatron_patch", "eval", *arguments)
        _, errors = process.communicate()
        return process.returncode, errors

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()


@dataclass(frozen=True)
class Downloaded:
    """What `eval --download` left: its folder, the libraries' cache, its messages, the files it asked the hub for."""

    folder: Path
    home: Path
    hub: Hub
    errors: str
    fetched: tuple[str, ...]


class _Handler(BaseHTTPRequestHandler):
    server_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        route = _ROUTE.fullmatch(unquote(url.path))
        if route is None:
            self._missing("EntryNotFound")
        elif route["digest"]:
            self._large(route["digest"])
        elif route["api"]:
            self._api(route, body)
        else:
            self._resolve(("datasets/" if route["kind"] else "models/") + route["name"], route["path"])

    def _api(self, route: re.Match[str], body: bytes) -> None:
        files = self.server_hub.files.get(f"{route['api']}/{route['repo']}")
        if files is None:
            return self._missing("RepoNotFound")
        if route["what"] == "tree":
            under = f"{route['under']}/" if route["under"] else ""
            inside = [f for path, f in files.items() if path.startswith(under)]
            if not inside:
                return self._missing("EntryNotFound")
            folders = {parent.as_posix() for f in inside for parent in Path(f.path).parents if parent.as_posix() != "."}
            folders = {f for f in folders if f.startswith(under)}
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
            entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": f} for f in sorted(folders)]
            entries += [f.entry() for f in inside]
            return self._json([e for e in entries if recursive or "/" not in e["path"].removeprefix(under)])
        if route["what"] == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            found = [files[path].entry() for path in wanted if path in files]
            found += [
                {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
                for path in wanted
                if path not in files and any(p.startswith(f"{path}/") for p in files)
            ]
            return self._json(found)
        self._json({
            "_id": "0" * 24, "id": route["repo"], "sha": COMMIT, "private": False, "gated": False, "disabled": False,
            "lastModified": "2024-02-26T00:00:00.000Z", "createdAt": "2024-02-26T00:00:00.000Z", "downloads": 0,
            "likes": 0, "tags": [], "siblings": [{"rfilename": path} for path in files],
        })  # fmt: skip

    def _resolve(self, repo: str, path: str) -> None:
        files = self.server_hub.files.get(repo)
        if files is None:
            return self._missing("RepoNotFound")
        if path not in files:
            return self._missing("EntryNotFound")
        file = files[path]
        headers = {"X-Repo-Commit": COMMIT}
        if file.is_large:
            headers |= {"X-Linked-Size": str(len(file.content)), "X-Linked-ETag": f'"{file.sha256}"'}
            return self._send(302, b"", {**headers, "Location": f"{self.server_hub.cdn}/cdn/{file.sha256}"})
        self._send(200, file.content, {**headers, "ETag": f'"{file.oid}"'})

    def _large(self, digest: str) -> None:
        hub = self.server_hub
        repo, file = hub.by_digest[digest]
        content, name = file.content, f"{repo.partition('/')[2]}/{file.path}"
        if self.command == "GET":
            if hub.stop_after is not None and len(hub.fetched) >= hub.stop_after:
                hub.stopped.set()
                hub._over.wait()  # the connection hangs until the hub is shut down
                return
            hub.fetched.append(name)
        if name in hub.damage:
            content = content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        self._send(200, content, {"ETag": f'"{digest}"'}, cut=self.command == "GET" and name in hub.cut)
        if name in hub.cut:
            hub.cut.remove(name)

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json", "X-Repo-Commit": COMMIT})

    def _missing(self, code: str) -> None:
        self._send(404, b'{"error":"not found"}', {"X-Error-Code": code, "Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
            self.close_connection = cut
