"""A real ComfyUI process with the pack in its custom_nodes, driven over HTTP and websocket (tests and demo)."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import websocket

ROOT = Path(__file__).resolve().parent.parent
PACK_NAME = "ComfyUI-NextStep"
PREVIEW_EVENTS = (1, 4)
TEXT_EVENT = 3
START_SECONDS = 300
NO_HOST = "no ComfyUI found: make hosts with scripts/hosts.sh, or set COMFYUI_PATH to a checkout"


def find_comfyui() -> Path | None:
    """The ComfyUI to test in: COMFYUI_PATH, else the one that this pack is installed in, else ~/ComfyUI."""
    stated = os.environ.get("COMFYUI_PATH")
    candidates = [Path(stated)] if stated else [ROOT.parent.parent, Path.home() / "ComfyUI"]
    return next((path for path in candidates if (path / "comfy" / "model_management.py").is_file()), None)


def frontend_option() -> list[str]:
    """COMFYUI_FRONTEND names a folder that pip has put another frontend into than the host brings."""
    folder = os.environ.get("COMFYUI_FRONTEND")
    return ["--front-end-root", str(Path(folder) / "comfyui_frontend_package" / "static")] if folder else []


def host_version(comfyui: Path) -> str:
    """Which ComfyUI that is, and its frontend."""
    (version,) = re.findall(r'__version__ = "(.+)"', (comfyui / "comfyui_version.py").read_text())
    other = os.environ.get("COMFYUI_FRONTEND")
    return f"{version} with frontend {Path(other).name if other else metadata.version('comfyui-frontend-package')}"


def make_base(folder: Path, link: bool = True) -> Path:
    """An empty ComfyUI base directory, with the pack linked into it unless `link` is False."""
    for name in ("custom_nodes", "models/nextstep", "models/vae", "input", "output", "temp", "user"):
        (folder / name).mkdir(parents=True)
    if link:
        (folder / "custom_nodes" / PACK_NAME).symlink_to(ROOT, target_is_directory=True)
    return folder


@dataclass
class Run:
    """What came over the websocket while one prompt ran."""

    prompt_id: str
    events: list[tuple[str, dict]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def events_of(self, kind: str) -> list[dict]:
        return [data for name, data in self.events if name == kind]

    @property
    def ended(self) -> str:
        return self.events[-1][0]


class ComfyServer:
    """Talks to one running server."""

    def __init__(self, base: Path, port: int, log: Path, pid: int) -> None:
        self.base, self.port, self.log, self.pid = base, port, log, pid

    def said(self) -> str:
        """The log's messages, without the colored levels that newer versions put before them."""
        return re.sub(r"^(\x1b\[\d+m)?\[[A-Z]+\](\x1b\[0m)? ", "", self.log.read_text(), flags=re.MULTILINE)

    def call(self, path: str, body: dict | None = None) -> Any:
        """GET, or POST a body; the JSON answer, also of a refusal."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                content = answer.read()
        except urllib.error.HTTPError as refusal:
            content = refusal.read()
        return json.loads(content) if content else None

    def queue(self, prompt: dict, client: str, workflow: dict | None = None) -> dict:
        extra = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
        return self.call("/prompt", {"prompt": prompt, "client_id": client, "extra_data": extra})

    def run(self, prompt: dict, workflow: dict | None = None, interrupt_at: int | None = None) -> Run:
        """Queue a prompt and listen until it ends; interrupt once a node's progress reaches `interrupt_at`."""
        client = uuid.uuid4().hex
        channel = websocket.create_connection(f"ws://127.0.0.1:{self.port}/ws?clientId={client}", timeout=120)
        try:
            answer = self.queue(prompt, client, workflow)
            assert "prompt_id" in answer, answer
            run = Run(answer["prompt_id"])
            self._listen(channel, run, interrupt_at)
            return run
        finally:
            channel.close()

    def _listen(self, channel: websocket.WebSocket, run: Run, interrupt_at: int | None) -> None:
        ends = ("execution_success", "execution_error", "execution_interrupted")
        while True:
            message = channel.recv()
            if isinstance(message, bytes):
                kind = struct.unpack(">I", message[:4])[0]
                if kind in PREVIEW_EVENTS:
                    run.previews.append(message[8:])
                elif kind == TEXT_EVENT:
                    run.texts.append(message[8 + struct.unpack(">I", message[4:8])[0] :].decode())
                continue
            event = json.loads(message)
            if event["data"].get("prompt_id") != run.prompt_id:
                continue
            run.events.append((event["type"], event["data"]))
            if event["type"] == "progress" and interrupt_at is not None and event["data"]["value"] >= interrupt_at:
                interrupt_at = None
                self.call("/interrupt", {})
            if event["type"] in ends:
                return

    def images(self, run: Run) -> list[Path]:
        """Files that a finished run saved."""
        deadline = time.monotonic() + 10
        while not (history := self.call(f"/history/{run.prompt_id}")) and time.monotonic() < deadline:
            time.sleep(0.05)  # the host announces success a moment before it writes the history
        outputs = history[run.prompt_id]["outputs"]
        images = [image for node in outputs.values() for image in node.get("images", []) if image["type"] == "output"]
        return [self.base / "output" / image["subfolder"] / image["filename"] for image in images]


def free_port() -> int:
    """A port of this computer that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running_server(comfyui: Path, base: Path, *options: str, memory: str = "--cpu") -> Iterator[ComfyServer]:
    """Start the ComfyUI at `comfyui` on `base` and stop it at the end. `memory` is one of its flags for that."""
    port, log = free_port(), base / "server.log"
    command = [
        sys.executable, "main.py", memory, "--listen", "127.0.0.1", "--port", str(port),
        "--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--disable-api-nodes", *options,
        *frontend_option(),
    ]  # fmt: skip
    # One thread: the models here are tiny, and threads that wait for each other on a busy machine cost minutes.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=comfyui, stdout=output, stderr=subprocess.STDOUT, env=environment)
    server = ComfyServer(base, port, log, process.pid)
    try:
        _wait_until_ready(server, process)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_until_ready(server: ComfyServer, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            server.call("/system_stats")
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"ComfyUI did not start:\n{server.log.read_text()[-4000:]}")
