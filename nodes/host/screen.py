"""What the user of ComfyUI sees of a run, and in which language; what goes into the pictures."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfy.utils
from comfy.cli_args import args
from comfy_api.latest import io
from comfy_execution.utils import get_executing_context
from PIL import Image
from torch import Tensor

from ...nextstep_core.loading.files import read_all
from .folders import user_folder

Interrupted = mm.InterruptProcessingException
SETTINGS = Path("default", "comfy.settings.json")  # below the folder of users
LONGEST_SETTINGS = 1 << 24  # bytes
TEXT_SECONDS = 0.5


def schema(**arguments: Any) -> io.Schema:
    """An `io.Schema`, less the arguments that this version of the host does not know yet."""
    return io.Schema(**{k: v for k, v in arguments.items() if k in io.Schema.__dataclass_fields__})


def user_language() -> str:
    """The language that the user reads, as the frontend names it, such as "ko"; empty where nobody can tell.

    It is a setting of the user's. Where it was never set, the frontend goes by the browser, and so does this, if all
    that are connected agree. Which of several users has queued a workflow, the host does not tell its nodes.
    """
    if args.multi_user:
        return ""
    try:
        settings = json.loads(read_all(user_folder() / SETTINGS, LONGEST_SETTINGS))
    except (OSError, ValueError, RecursionError):  # not there yet, or half written
        settings = None
    chosen = settings.get("Comfy.Locale") if isinstance(settings, dict) else None
    return chosen if isinstance(chosen, str) and chosen else _language_of_browsers()


def _language_of_browsers() -> str:
    sockets = list(getattr(_server(), "sockets", {}).values())
    headers = [getattr(getattr(socket, "_req", None), "headers", {}) for socket in sockets]
    told = {str(header.get("Accept-Language", "")).split(",")[0].split(";")[0].strip() for header in headers}
    return told.pop() if len(told) == 1 else ""


def _server() -> Any:
    """The host's server; None where it runs as a library."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def serve(address: str, answer: Callable[[Mapping[str, str]], tuple[int, str]]) -> None:
    """Answer GET requests at an address: `answer` takes the query and returns a status and a page of HTML."""
    server = _server()
    if server is None:
        return
    from aiohttp import web

    async def handle(request: web.Request) -> web.Response:
        status, page = await asyncio.to_thread(answer, request.query)
        return web.Response(status=status, text=page, content_type="text/html", headers={"X-Frame-Options": "DENY"})

    server.routes.get(address)(handle)


def notes_for_picture(node: type[io.ComfyNode]) -> dict[str, str] | None:
    """Prompt and workflow, as JSON under the names that the host reads them by; None where it is told to save none."""
    if args.disable_metadata:
        return None
    hidden = getattr(node, "hidden", None)
    notes = {"prompt": getattr(hidden, "prompt", None), **(getattr(hidden, "extra_pnginfo", None) or {})}
    return {name: json.dumps(value) for name, value in notes.items() if value is not None}


def note_in_picture(node: type[io.ComfyNode], facts: dict[str, Any]) -> None:
    """Put facts of a run into what the host writes into its pictures, beside the workflow, where it writes anything."""
    notes = getattr(getattr(node, "hidden", None), "extra_pnginfo", None)
    if isinstance(notes, dict):
        notes["nextstep"] = facts


def check_interrupt() -> None:
    """Raise the host's own exception when the user pressed Interrupt."""
    mm.throw_exception_if_processing_interrupted()


class ProgressReporter:
    """The bar, a line of text and the live preview on the running node. Every call also stops the run on Interrupt."""

    def __init__(self, total: int) -> None:
        self._bar = comfy.utils.ProgressBar(total)
        self._said_at = 0.0

    def update(
        self, done: int, preview: Tensor | None = None, size: tuple[int, int] = (0, 0), text: str | None = None
    ) -> None:
        """Show `done` items; preview (h, w, 3) uint8 is enlarged to size (width, height)."""
        check_interrupt()
        if text is not None and time.monotonic() - self._said_at >= TEXT_SECONDS:
            self._said_at = time.monotonic()
            show_text(text)
        image = None
        if preview is not None:
            image = ("JPEG", Image.fromarray(preview.numpy()).resize(size, Image.Resampling.BILINEAR), None)
        self._bar.update_absolute(done, preview=image)


def show_text(text: str) -> None:
    """Put a line of text on the running node, where the host has a server (it has none when it runs as a library)."""
    server, context = _server(), get_executing_context()
    if server is not None and context is not None:
        server.send_progress_text(text, context.node_id)
