"""The good checkpoint that file kinds change, and drawing with what became of it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nextstep_core import NextStepPipeline

CHECKPOINT = Path(__file__).resolve().parents[1] / "data" / "golden" / "tiny-a"
SHAPE = (1, 32, 48, 3)  # of the picture that `draw` draws


def lay_out(folder: Path) -> Path:
    """The good checkpoint in an empty folder, as links; `put` takes the place of one."""
    (folder / "vae").mkdir()
    for path in CHECKPOINT.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(CHECKPOINT)).symlink_to(path)
    return folder


def put(path: Path, content: bytes | str) -> None:
    """Write a file anew, never through a link."""
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def draw(
    checkpoint: Path, vae: Path | None = None, quantization: str | None = None, prompt: str = "A red apple."
) -> Tensor:
    """Load and draw a small picture in a few steps."""
    pipeline = NextStepPipeline.from_pretrained(checkpoint, vae=vae, dtype=torch.float32, quantization=quantization)
    _, height, width, _ = SHAPE
    return pipeline.generate(prompt, height=height, width=width, steps=2, cfg=2.0, sampler="flow-ode").images
