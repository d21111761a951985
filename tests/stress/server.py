"""Prompts for a real server, small and quick, and what its process takes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.comfy_server import NO_HOST, ComfyServer, find_comfyui, make_base, running_server
from tests.fake_hub import GOLDEN

SETTINGS = {"steps": 3, "cfg": 2.0, "cfg_schedule": "constant", "shift": 1.0, "sampler": "auto", "use_norm": "auto"}
MODELS = ("tiny-a", "tiny-b")  # one checkpoint under two names: to the nodes they are two


def node(class_type: str, **inputs: Any) -> dict:
    """One node of a prompt in API form; a link is [node id, output index]."""
    return {"class_type": class_type, "inputs": inputs}


def text(seed: int, model: str = MODELS[0], size: int = 64, batch: int = 1, words: str = "a red circle") -> dict:
    """Text to image, previewed and not saved."""
    return {
        "model": node("NextStepModelLoader", model_name=model, dtype="fp32", quantization="none"),
        "positive": node("NextStepTextEncode", model=["model", 0], prompt=words),
        "latent": node("NextStepEmptyLatent", width=size, height=size, batch_size=batch),
        "sampler": node(
            "NextStepSampler",
            model=["model", 0], positive=["positive", 0], latent=["latent", 0], seed=seed, **SETTINGS,
        ),
        "decode": node("NextStepVAEDecode", samples=["sampler", 0], vae=["model", 1]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="stress"),
    }  # fmt: skip


def edit(seed: int, size: int = 64, count: int = 1) -> dict:
    """So many plain pictures, edited."""
    prompt = text(seed)
    prompt["picture"] = node("EmptyImage", width=size, height=size, batch_size=count, color=0xE02020)
    prompt["positive"] = node(
        "NextStepEditEncode",
        model=["model", 0], vae=["model", 1], image=["picture", 0], instruction="<image>Make it snow.", size="keep",
        width=size, height=size,
    )  # fmt: skip
    prompt["sampler"]["inputs"]["latent"] = ["positive", 1]
    return prompt


def masked(seed: int) -> dict:
    """The lower half drawn anew."""
    prompt = text(seed)
    prompt["clear"] = node("SolidMask", value=0.0, width=64, height=64)
    prompt["lower"] = node("SolidMask", value=1.0, width=64, height=32)
    prompt["mask"] = node("MaskComposite", destination=["clear", 0], source=["lower", 0], x=0, y=32, operation="add")
    prompt["masked"] = node("SetLatentNoiseMask", samples=["latent", 0], mask=["mask", 0])
    prompt["sampler"]["inputs"]["latent"] = ["masked", 0]
    return prompt


def broken(seed: int) -> dict:
    """Fails when it runs: a latent of another kind of model."""
    prompt = text(seed)
    prompt["latent"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    return prompt


@dataclass(frozen=True)
class Usage:
    """What a process takes: resident megabytes, threads and open files."""

    megabytes: float
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        """As Linux tells it."""
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = {name: value.split()[0] for name, value in (line.split(":\t") for line in lines) if value.strip()}
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return cls(int(status["VmRSS"]) / 1024, int(status["Threads"]), files)


@contextmanager
def stressed_server(folder: Path) -> Iterator[ComfyServer]:
    """A server with the same small checkpoint under every name in MODELS."""
    comfyui = find_comfyui()
    assert comfyui is not None, NO_HOST
    base = make_base(folder)
    for name in MODELS:
        shutil.copytree(GOLDEN, base / "models" / "nextstep" / name)
    with running_server(comfyui, base) as server:
        yield server
