"""A hub on this machine: the few routes by which huggingface_hub lists and fetches one commit of one model."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

NAME, COMMIT = "owner/tiny-moe", "0123456789abcdef0123456789abcdef01234567"

DISABLED = "Access to this resource is disabled."  # the hub's library knows a disabled repository by this sentence


class Hub(ThreadingHTTPServer):
    """``files`` by name; ``refusal`` (status, X-Error-Code) in place of every answer; ``asked`` is what was requested."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.refusal: tuple[int, str] | None = None
        self.cut: str = ""
        self.asked: list[str] = []


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        if self.server.refusal is not None:
            status, code = self.server.refusal
            return self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": DISABLED if code == "DisabledRepo" else "no"}, body)
        if path == f"/api/models/{NAME}/tree/{COMMIT}":
            files = self.server.files.items()
            rows = [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files]
            return self.reply(200, json.dumps(rows).encode(), {"Content-Type": "application/json"}, body)
        start = f"/{NAME}/resolve/{COMMIT}/"
        if path.startswith(start) and (content := self.server.files.get(path.removeprefix(start))) is not None:
            if body and self.server.cut and path.endswith(self.server.cut):
                self.close_connection = True
                return None
            return self.reply(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, body)
        return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def reply(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@contextmanager
def local_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Point huggingface_hub at a fresh hub and an empty cache while the block runs."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
