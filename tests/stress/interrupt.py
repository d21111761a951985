"""How long Interrupt takes, at random moments of every stage, in a real server.

    python -m tests.stress.interrupt --count 20

For each stage so many runs are interrupted; the time is from the request to the event that tells of the end. Needs a
ComfyUI (see scripts/hosts.sh).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import websocket

from nextstep_core.loading.locks import held
from nextstep_core.sentences import Sentence
from scripts.comfy_server import ComfyServer
from tests.fake_hub import Hub

from .server import edit, node, stressed_server, text

ENDS = ("execution_success", "execution_error", "execution_interrupted")
DOWNLOAD = {"get": node("NextStepDownload", checkpoint="NextStep-1.1", revision="main")}


@dataclass(frozen=True)
class Stage:
    """A prompt whose node `at` is interrupted up to `within` seconds after it began."""

    prompt: dict
    at: str
    within: float


def decoding(size: int) -> dict:
    """An empty canvas through the VAE: the time of a large picture, without drawing it."""
    prompt = text(seed=0, size=size)
    prompt["decode"]["inputs"]["samples"] = ["latent", 0]
    return {name: prompt[name] for name in ("model", "latent", "decode", "save")}


def stages(seed: int) -> dict[str, Stage]:
    """What is interrupted; another seed is another run, which the host does not take from its cache."""
    loading = text(seed)
    loading["model"]["inputs"] |= {"model_name": "tiny (embedded)", "quantization": "int4"}
    return {
        "loading and quantizing": Stage(loading, "model", 0.5),
        "drawing 256x256": Stage(text(seed, size=256), "sampler", 2.0),
        "encoding 4 pictures of 512x512": Stage(edit(seed, size=512, count=4), "positive", 1.0),
        "decoding 1024x1024": Stage(decoding(1024), "decode", 2.0),
        "downloading": Stage(DOWNLOAD, "get", 3.0),
        "waiting for another download": Stage(DOWNLOAD, "get", 2.0),
    }


def seconds_to_end(server: ComfyServer, stage: Stage, delay: float) -> float | None:
    """Seconds from the request to the end of an interrupted run; None where the run had ended before."""
    client, asked = uuid.uuid4().hex, []

    def press() -> None:
        asked.append(time.monotonic())
        server.call("/interrupt", {})

    channel = websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId={client}", timeout=300)
    try:
        prompt_id = server.queue(stage.prompt, client)["prompt_id"]
        timer = threading.Timer(delay, press)
        while True:
            message = channel.recv()
            if isinstance(message, bytes):
                continue
            event = json.loads(message)
            if event["data"].get("prompt_id") != prompt_id:
                continue
            if event["type"] == "executing" and event["data"].get("node") == stage.at:
                timer.start()
            if event["type"] in ENDS:
                ended = time.monotonic()
                timer.cancel()
                return ended - asked[0] if asked and event["type"] == "execution_interrupted" else None
    finally:
        channel.close()


def measure(server: ComfyServer, name: str, count: int, moments: random.Random) -> list[float]:
    """Seconds of `count` interrupted runs of a stage, as far as runs were caught."""
    found: list[float] = []
    for seed in range(3 * count):
        if len(found) == count:
            break
        server.call("/free", {"unload_models": True, "free_memory": True})
        stage = stages(seed)[name]
        seconds = seconds_to_end(server, stage, moments.uniform(0, stage.within))
        found += [] if seconds is None else [seconds]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="interrupts of each stage")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    hub = Hub()
    hub.pause = 0.2
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "hf")}
        with stressed_server(folder / "base") as server:
            for stage in stages(0):
                own = folder / "base" / "models" / "nextstep" / "NextStep-1.1" / ".cache" / "huggingface"
                own.mkdir(parents=True, exist_ok=True)
                if stage.startswith("waiting"):
                    with held(own / "nextstep.lock", Sentence("held")):
                        seconds = measure(server, stage, options.count, moments)
                else:
                    seconds = measure(server, stage, options.count, moments)
                if not seconds:
                    print(f"{stage}: never caught")
                    continue
                print(
                    f"{stage}: {len(seconds)} interrupts, median {statistics.median(seconds):.3f} s, "
                    f"maximum {max(seconds):.3f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
