"""A local stand-in of the hub's HTTP API: as much of it as downloads of a snapshot ask for.

`with Hub() as hub:` serves on a port of its own; `hub.repositories` has the files of each repository.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories in memory: (kind, name) -> path -> bytes. asked: method and path of every request."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.asked: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sha(self, key: tuple[str, str]) -> str:
        parts = [f"{path} {hashlib.sha1(data).hexdigest()}" for path, data in sorted(self.repositories[key].items())]
        return hashlib.sha1("\n".join(parts).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """Answers for a hub, which a subclass names."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self._asked()
        key = _key(path)
        if "/resolve/" in path:
            self._resolve(path)
        elif key not in self.hub.repositories:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            files = self.hub.repositories[key].items()
            self._json([{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files])
        else:
            sha = self._commit(key, path.partition("/revision/")[2])
            self._json({"id": key[1], "sha": sha, "private": False, "tags": []})

    do_HEAD = do_GET

    def _asked(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        return path

    def _resolve(self, path: str) -> None:
        before, _, after = path.partition("/resolve/")
        kind, name = ("datasets", before[10:]) if before.startswith("/datasets/") else ("models", before[1:])
        revision, _, file = after.partition("/")
        data = self.hub.repositories.get((kind, name), {}).get(file)
        if data is None:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        else:
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self._bytes(data, 200, {"X-Repo-Commit": self._commit((kind, name), revision), "ETag": etag})

    def _commit(self, key: tuple[str, str], revision: str) -> str:
        """Return the commit that is asked for, whose files are today's, or else the newest."""
        return revision if len(revision) == 40 else self.hub.sha(key)

    def _json(self, value: object, code: int = 200, more: dict[str, str] | None = None) -> None:
        self._bytes(json.dumps(value).encode(), code, {"Content-Type": "application/json", **(more or {})})

    def _bytes(self, data: bytes, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _key(path: str) -> tuple[str, str]:
    """/api/datasets/OWNER/NAME/... -> (datasets, OWNER/NAME)."""
    _, _, kind, owner, name, *_ = [*path.split("/"), "", "", ""]
    return kind, f"{owner}/{name}"
