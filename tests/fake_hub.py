"""A Hugging Face hub on this machine, with a few repositories: as much of its API as fetching a checkpoint needs."""

from __future__ import annotations

import hashlib
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent / "data" / "golden" / "tiny-a"
COMMIT = "c0ffee" + "0" * 34
REPO = "stepfun-ai/NextStep-1.1"
EDITING = "stepfun-ai/NextStep-1-Large-Edit"
VAE_ALONE = "stepfun-ai/NextStep-1-f8ch16-Tokenizer"


class Hub(ThreadingHTTPServer):
    """Serves the reference checkpoint under two names, with a Python file that nobody may fetch, and its VAE alone.

    `refusal` is the HTTP status and the hub's own code of an answer to everything, where it is set.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {str(p.relative_to(GOLDEN)): p.read_bytes() for p in GOLDEN.rglob("*") if p.is_file()}
        self.files["modeling.py"] = b"raise SystemExit('remote code ran')"
        vae = {name.removeprefix("vae/"): data for name, data in self.files.items() if name.startswith("vae/")}
        self.repositories = {REPO: self.files, EDITING: self.files, VAE_ALONE: vae}
        self.refusal: tuple[int, str] | None = None
        self.lie_about: str | None = None
        self.damaged: dict[str, bytes] = {}  # what is sent in the place of a file
        self.asked: list[tuple[str, str | None]] = []
        self.bytes_sent, self.pause = 0, 0.0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: tests kill and interrupt those who ask."""

    def listing(self, repo: str) -> dict:
        files = []
        for name, data in self.repositories[repo].items():
            entry = {
                "rfilename": name,
                "size": len(data),
                "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
            }
            if name.endswith((".safetensors", ".pt")):
                digest = "0" * 64 if name == self.lie_about else hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            files.append(entry)
        return {
            "id": repo,
            "modelId": repo,
            "sha": COMMIT,
            "siblings": files,
            "tags": [],
            "private": False,
            "downloads": 0,
        }


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        path = self.path.split("?")[0]
        if self.server.refusal is not None:
            status, code = self.server.refusal
            return self.reply(status, b"{}", send, {"X-Error-Code": code})
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if path.startswith("/api/models/") and repo in self.server.repositories:
            return self.reply(200, json.dumps(self.server.listing(repo)).encode(), send)
        name = path.removeprefix(f"/{repo}/resolve/{COMMIT}/")
        data = self.server.damaged.get(name, self.server.repositories.get(repo, {}).get(name))
        if data is None:
            return self.reply(404, b"{}", send, {"X-Error-Code": "RepoNotFound"})
        if send:
            self.server.asked.append((name, self.headers.get("Range")))
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, start = 200, 0
        if wanted := self.headers.get("Range"):
            start, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.reply(status, data[start:], send, headers)

    def reply(self, status: int, body: bytes, send: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(body) if send else 0, 50_000):
            self.wfile.write(body[start : start + 50_000])
            self.server.bytes_sent += len(body[start : start + 50_000])
            time.sleep(self.server.pause)
