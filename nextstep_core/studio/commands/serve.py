"""A server: pictures for other programs of this machine, or of others where there is a key."""

from __future__ import annotations

import os
import socket
from contextlib import closing, suppress
from ipaddress import ip_address
from typing import Annotated

import typer

from ...errors import NextStepError, check_text
from ...images.latents import WIDTH
from ...ranges import Range
from ...runtime.devices import best_device
from ...sampling.settings import STEPS
from ..batch import TOGETHER
from ..cluster import Where, where_of
from ..model_choice import PLAIN, ModelChoice
from ..serving.app import Server, Settings
from ..serving.asked import Limits
from ..serving.fleet import Fleet, import_serve
from ..serving.line import PLACES, Line
from .app import Json, Output, command
from .model import Device, Dtype, Loras, MaxMemory, ModelFolder, ModelName, Quantization

KEY = "NEXTSTEP_API_KEY"  # in the environment: what stands in a command line, every user of the machine can read
SHORTEST_KEY = 16  # letters
PORT, SIDE, MOST_STEPS = Range("--port", 1, 65_535), Range("--max-side", 16, WIDTH.maximum), STEPS


def key_for(host: str) -> str | None:
    """The key that requests must have; NextStepError where one is needed and there is none."""
    key = os.environ.get(KEY)
    if key is not None:
        if len(check_text(KEY, key)) < SHORTEST_KEY or not key.isascii() or not key.isprintable():
            raise NextStepError(
                "The API key in {name} is too short. Use at least {least} letters and digits that nobody can guess.",
                name=KEY,
                least=SHORTEST_KEY,
            )
        return key
    here = host == "localhost"
    with suppress(ValueError):
        here = ip_address(host).is_loopback
    if not here:
        raise NextStepError(
            "At {host}, others can reach the server. Put an API key into the variable {name} first.",
            host=host,
            name=KEY,
        )
    return None


def listening(host: str, port: int) -> socket.socket:
    """A socket that has this address, and does not listen yet; NextStepError where it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        return found
    except (OSError, UnicodeError) as error:
        raise NextStepError(
            "{host}, port {port}, cannot be used ({reason}). Choose another --port.",
            host=host,
            port=port,
            reason=getattr(error, "strerror", None) or type(error).__name__,
        ) from None


@command(
    "serve",
    "nextstep serve --model NextStep-1.1",
    "nextstep serve --model tiny --workers 2 --port 8080",
    f"{KEY}=... nextstep serve --host 0.0.0.0 --gpus all",
)
def serve(
    model: ModelName = None,
    models: ModelFolder = None,
    host: Annotated[
        str, typer.Option("--host", help=f"The address to listen at; others than this machine's need {KEY}.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="The port to listen at.")] = 8000,
    gpus: Annotated[str | None, typer.Option("--gpus", help="all, or how many: the model on each.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Workers on CPUs in their place.")] = None,
    queue: Annotated[int, typer.Option("--queue", help="Pictures that may wait; further ones are refused.")] = 64,
    together: Annotated[int, typer.Option("--together", help="Pictures to draw at once, at most.")] = 8,
    max_side: Annotated[int, typer.Option("--max-side", help="Pixels of a picture's side, at most.")] = 1024,
    max_steps: Annotated[int, typer.Option("--max-steps", help="Sampling steps that may be asked for.")] = 100,
    quantization: Quantization = PLAIN,
    max_memory: MaxMemory = None,
    lora: Loras = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Draw for other programs, by OpenAI's images API: generations, edits, and pictures on the way."""
    out = Output(as_json)
    PLACES.check(queue)
    TOGETHER.check(together)
    limits = Limits(SIDE.check(max_side), MOST_STEPS.check(max_steps))
    key = key_for(host)
    on_cpus = gpus is None and workers is None and (device == "cpu" or best_device().type == "cpu")
    where = Where(workers=1) if on_cpus else where_of(gpus or (None if workers else "all"), workers, None)
    assert where is not None
    import_serve()
    choice = ModelChoice(model, models, quantization, max_memory, device, dtype, tuple(lora or ()))
    name = choice.prepare().facts["Model"]
    with closing(listening(host, PORT.check(port))) as at:
        import uvicorn

        with out.bar("Starting workers"):
            fleet = Fleet(where, choice.as_data())
        try:
            line = Line(fleet.draw, fleet.workers, queue, together)
            app = Server(line, Settings(name, key, limits)).app()
            shown = f"[{host}]" if ":" in host else host
            facts = {"address": f"http://{shown}:{port}/v1", "model": name, "workers": fleet.workers}
            out.result(facts, f"{name} draws at {facts['address']}. Ctrl-C ends it.")
            config = uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5
            )
            uvicorn.Server(config).run(sockets=[at])
        finally:
            fleet.shutdown()
