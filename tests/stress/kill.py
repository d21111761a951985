"""Kill runs at random moments, and see what they leave and whether the next one ends well.

    python -m tests.stress.kill --count 200

Three kinds in turn: a download from a hub on this machine, a conversion, and drawing with a freshly loaded model. A
kill is SIGKILL, at a moment drawn evenly from the time that the run takes undisturbed. After it no file under a final
name may be torn, and the same run, started again, must come to the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from nextstep_core import NextStepPipeline
from nextstep_core.loading import download as downloading
from nextstep_core.loading.build import plan_model
from nextstep_core.loading.single_file import save_model
from tests.fake_hub import GOLDEN, Hub

FORK = multiprocessing.get_context("fork")  # a child has imported everything, so that kills meet the work itself
SECONDS = 120  # that any run may take


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Of every file under its final name: what is hidden, locked or unfinished has another."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)
    final = (path for path in files if not path.name.startswith(".") and path.suffix != ".part")
    return {path.relative_to(folder).as_posix(): digest(path.read_bytes()) for path in final}


def download(folder: Path) -> None:
    plan = downloading.plan_download("NextStep-1.1", folder)
    downloading.download(plan, lambda *_: None)


def convert(folder: Path) -> None:
    save_model(plan_model(GOLDEN, "int8"), folder / "x.safetensors", torch.bfloat16)


def draw(folder: Path) -> None:
    """Load and draw; the picture's numbers are written at the very end."""
    torch.set_num_threads(1)
    pipeline = NextStepPipeline.from_pretrained(GOLDEN, dtype=torch.float32, quantization="int8")
    picture = pipeline.generate("a red circle", height=32, width=32, steps=4, seed=1).images
    part = folder / "picture.part"
    part.write_bytes(picture.numpy().tobytes())
    os.replace(part, folder / "picture")


KINDS: dict[str, Callable[[Path], None]] = {"download": download, "convert": convert, "draw": draw}


class Failed(Exception):
    """What a kill has broken."""


def run_to_the_end(kind: str, folder: Path) -> float:
    """Seconds that an undisturbed run takes; Failed when it does not end well."""
    child, started = FORK.Process(target=KINDS[kind], args=(folder,)), time.monotonic()
    child.start()
    child.join(SECONDS)
    if child.exitcode != 0:
        child.kill()
        raise Failed(f"the run after a kill ended with {child.exitcode}")
    return time.monotonic() - started


def kill_after(kind: str, folder: Path, seconds: float) -> bool:
    """Start a run and kill it after so long; whether it was still at work."""
    child = FORK.Process(target=KINDS[kind], args=(folder,))
    child.start()
    child.join(seconds)
    alive = child.is_alive()
    child.kill()
    child.join()
    return alive


def case(kind: str, seconds: float, wanted: dict[str, str]) -> bool:
    """Kill one run, look at what it left, and run it again; whether the kill met it at work. Failed otherwise."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        met = kill_after(kind, folder, seconds)
        torn = [path for path, found in digests(folder).items() if wanted.get(path) != found]
        if torn:
            raise Failed(f"torn under a final name: {', '.join(torn)}")
        run_to_the_end(kind, folder)
        if digests(folder) != wanted:
            raise Failed("the next run came to other bytes")
        ours = (path for path in folder.rglob("*") if ".cache" not in path.parts)
        left = [path.name for path in ours if path.suffix in (".part", ".lock")]
        if left:
            raise Failed(f"left behind: {', '.join(left)}")
        return met


def undisturbed(kind: str) -> tuple[float, dict[str, str]]:
    """How long a run takes, and the bytes that it comes to."""
    with tempfile.TemporaryDirectory() as name:
        run_to_the_end(kind, Path(name))
    with tempfile.TemporaryDirectory() as name:
        return run_to_the_end(kind, Path(name)), digests(Path(name))


def kill_many(count: int, seed: int = 0, say: Callable[[str], None] = print) -> Counter[str]:
    """So many kills; how many of each kind met a run at work, and how many failed, under "failed"."""
    moments, met = random.Random(seed), Counter[str]()
    known = {kind: undisturbed(kind) for kind in KINDS}
    for kind, (seconds, files) in known.items():
        say(f"{kind}: {seconds:.2f} s undisturbed, {len(files)} file(s)")
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        seconds, wanted = known[kind]
        moment = moments.uniform(0, seconds)
        try:
            met[kind] += case(kind, moment, wanted)
        except Failed as failure:
            met["failed"] += 1
            say(f"case {number}, {kind} killed after {moment:.2f} s: {failure}")
        if number % 20 == 19:
            say(f"{number + 1} kills, {met['failed']} failed")
    return met


def prepare_hub(home: Path) -> Hub:
    """A hub on this machine that is slow enough to be caught, as huggingface_hub's settings name it."""
    hub = Hub()
    hub.pause = 0.02
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    os.environ |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    return hub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp())
    prepare_hub(home)
    try:
        met = kill_many(options.count, options.seed)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    at_work = sum(met[kind] for kind in KINDS)
    print(f"{options.count} kills, {at_work} of them while the run was at work; failed: {met['failed']}")
    sys.exit(1 if met["failed"] else 0)


if __name__ == "__main__":
    main()
