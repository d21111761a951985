"""Runs of the decode loop for tests and benchmarks: token by token, and with windows of one size."""

from __future__ import annotations

import torch
from torch import Tensor

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.job import Job
from nextstep_core.decoding.lookahead import MOST, Windows, ahead
from nextstep_core.decoding.loop import Run
from nextstep_core.decoding.steps import CHUNK, StepCaches
from nextstep_core.decoding.window_choice import WindowChoice

CPU = torch.device("cpu")


@torch.inference_mode()
def plainly(pipe: NextStepPipeline, job: Job) -> Tensor:
    """The tokens of the plain loop."""
    *_, progress = pipe.engine.decode(job, CPU, pipe.dtype)
    return progress.tokens.clone()


@torch.inference_mode()
def begun(pipe: NextStepPipeline, job: Job, caches: StepCaches | None = None, kind: type[Windows] = Windows) -> Windows:
    """The windows of a job whose prompt is read."""
    tokens = torch.zeros(job.pictures, job.total, pipe.engine.config.token_dim, dtype=pipe.dtype)
    if job.known is not None:
        job.known.fill(tokens)
    embeds = pipe.engine.embed(job.rows, CPU, pipe.dtype)
    run = Run.start(pipe.engine.model, job, embeds, tokens, caches or StepCaches(), CHUNK, beyond=MOST)
    windows = kind(run, job.grid[1])
    for _ in windows.begin():
        pass
    return windows


@torch.inference_mode()
def solved(
    pipe: NextStepPipeline, job: Job, size: int, tolerance: float, caches: StepCaches | None = None
) -> tuple[Tensor, int]:
    """The tokens with windows of one size, and how many reads they took."""
    windows = begun(pipe, job, caches)
    for _ in ahead(windows, WindowChoice({size: 1.0}), tolerance):
        pass
    return windows.run.tokens, windows.reads


def distance(tokens: Tensor, wanted: Tensor) -> float:
    """Relative to the length of all tokens."""
    return float((tokens - wanted).norm() / wanted.norm())
