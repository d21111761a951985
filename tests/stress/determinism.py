"""What is bitwise equal, and what is not, as a table.

    python -m tests.stress.determinism
    python -m tests.stress.determinism --hosts ~/comfyui-hosts/0.3.64 ~/comfyui-hosts/0.33

One picture of the embedded model, drawn in pairs that differ in one thing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.job import KnownTokens
from nextstep_core.decoding.steps import StepCaches
from nextstep_core.request.layout import Caption

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red circle on a blue background"
SIZE = {"height": 96, "width": 96, "seed": 5}


def pipeline(threads: int = 1) -> NextStepPipeline:
    """The embedded model anew: nothing is kept from an earlier run."""
    torch.set_num_threads(threads)
    return NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)


def picture(**options: object) -> Tensor:
    """(H, W, 3) of a fresh model."""
    return pipeline().generate(PROMPT, **SIZE, **options).images[0]


def again() -> tuple[Tensor, Tensor]:
    """The second comes from a prompt that was read already."""
    pipe = pipeline()
    first, second = (pipe.generate(PROMPT, **SIZE).images[0] for _ in range(2))
    return first, second


def in_another_process() -> tuple[Tensor, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.npy"
        subprocess.run([sys.executable, "-m", __spec__.name, "--picture", str(path)], cwd=ROOT, check=True)
        return picture(), torch.from_numpy(np.load(path))


def beside_another() -> tuple[Tensor, Tensor]:
    beside = pipeline().generate([PROMPT, "a green square"], **SIZE).images[0]
    return picture(), beside


def one_after_another() -> tuple[Tensor, Tensor]:
    """A batch drawn together, and the same batch one picture at a time, as after running out of memory."""
    pipe = pipeline()
    job = pipe.engine.make_job(
        [Caption(PROMPT), Caption("a green square")], pipe.engine.grid(96, 96), pipe.engine.recommended(), seed=5
    )
    with torch.inference_mode():
        together, apart = (
            list(pipe.engine.decode(job, pipe.device, pipe.dtype, at_once))[-1].tokens for at_once in (2, 1)
        )
    return together, apart


def resumed() -> tuple[Tensor, Tensor]:
    """A run that was stopped in the middle and finished from what it had left."""
    pipe = pipeline()
    engine = replace(pipe.engine, caches=StepCaches(prefilled=None))
    grid, settings = engine.grid(96, 96), engine.recommended()
    with torch.inference_mode():
        whole = list(engine.decode(engine.make_job([Caption(PROMPT)], grid, settings, seed=5), pipe.device, pipe.dtype))
        tokens = whole[-1].tokens
        keep = torch.arange(tokens.shape[1]) < tokens.shape[1] // 2
        known = KnownTokens(tokens, keep, token_by_token=True)
        job = engine.make_job([Caption(PROMPT)], grid, settings, seed=5, known=known)
        return tokens, list(engine.decode(job, pipe.device, pipe.dtype))[-1].tokens


def two_threads() -> tuple[Tensor, Tensor]:
    return picture(), pipeline(threads=2).generate(PROMPT, **SIZE).images[0]


PAIRS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "two runs in one process, the second from a prompt that was kept": again,
    "two processes": in_another_process,
    "a run that was interrupted and finished": resumed,
    "a batch drawn together, or one picture after another": one_after_another,
    "alone, or beside another picture in a batch": beside_another,
    "one thread or two": two_threads,
}


def compared(first: Tensor, second: Tensor) -> str:
    """What a table says of two results."""
    if torch.equal(first, second):
        return "bitwise equal"
    return f"not equal; at most {(first - second).abs().max():.1e} apart"


def of_server(path: Path) -> None:
    """Draw one picture in a real server and keep it."""
    from .server import stressed_server
    from .soak import picture as server_picture

    with tempfile.TemporaryDirectory() as folder, stressed_server(Path(folder) / "base") as server:
        np.save(path, server_picture(server))


def between_hosts(hosts: list[Path]) -> str:
    """What a table says of one workflow in two hosts."""
    pictures = []
    with tempfile.TemporaryDirectory() as folder:
        for number, host in enumerate(hosts):
            path = Path(folder) / f"{number}.npy"
            command = [str(host / "venv" / "bin" / "python"), "-m", __spec__.name, "--server-picture", str(path)]
            environment = os.environ | {"COMFYUI_PATH": str(host / "ComfyUI")}
            subprocess.run(command, cwd=ROOT, env=environment, check=True)
            pictures.append(torch.from_numpy(np.load(path).astype(np.int16)))
    return compared(*pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=Path, nargs=2, help="two folders that scripts/hosts.sh has made")
    parser.add_argument("--picture", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--server-picture", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.picture:
        np.save(options.picture, picture().numpy())
    elif options.server_picture:
        of_server(options.server_picture)
    else:
        print("| Two results that differ in | They are |\n| --- | --- |")
        for name, pair in PAIRS.items():
            print(f"| {name} | {compared(*pair())} |", flush=True)
        if options.hosts:
            names = " and ".join(host.name for host in options.hosts)
            print(f"| ComfyUI {names}, the saved picture | {between_hosts(options.hosts)} |")


if __name__ == "__main__":
    main()
