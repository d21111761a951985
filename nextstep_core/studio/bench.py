"""How long a picture takes on this machine, part by part, and how near that is to what its memory allows.

The pictures are drawn as any others. The closer look, at parts and formats alone, is `python -m benchmarks` in a clone.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor

from .. import __version__
from ..decoding.budget import model_bytes, tensor_bytes
from ..decoding.floor import token_bytes
from ..decoding.progress import Progress
from ..errors import NextStepError
from ..pipeline import NextStepPipeline
from ..ranges import Range
from ..request.layout import Caption
from ..runtime.bandwidth import BUFFER_BYTES, bandwidth, wait
from ..runtime.devices import device_name, forget_peak, kind_of, peak_memory
from ..runtime.interrupt import Check, go_on
from ..runtime.placement import held_bytes
from ..runtime.quantization import quantized_linears

RUNS, WARM_UP = Range("runs", 1, 1000), Range("warm_up", 0, 100)
PROMPTS = (
    "A photograph of a lighthouse on a rocky coast at dusk, waves below, warm light in the lantern room.",
    "A red circle on a blue background.",
    "A bowl of oranges on a wooden table, soft morning light from a window on the left.",
)


@dataclass(frozen=True)
class Spread:
    """Median and ends of what was measured."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Bench:
    """What a benchmark measured. Seconds are of the `prompt` until its first token can be drawn, of a `token`, of the
    `vae` and of a whole `picture`; `load` is of the model, None where it was there already.

    `floor` is the seconds that a token takes at least, from the `token_bytes` that must be read for it at `bandwidth`
    bytes per second, and `share` the part of the measured time that it makes. `streamed` bytes of the weights come from
    the host for each token. `quality` is what the function that was handed in says of the pictures.
    """

    nextstep: str
    python: str
    torch: str
    kind: str
    device: str
    model: str
    weights: str
    dtype: str
    width: int
    height: int
    tokens: int
    sampler: str
    steps: int
    cfg: float
    max_memory: int | None
    runs: int
    warm_up: int
    load: float | None
    prompt: Spread
    token: Spread
    vae: Spread
    picture: Spread
    pictures_per_minute: float
    tokens_per_second: float
    quality: Spread | None
    token_bytes: int
    bandwidth: float
    floor: float
    share: float
    streamed: int
    peak_memory: int | None
    peak_memory_of: str


def bench(
    pipeline: NextStepPipeline,
    model: str,
    *,
    prompts: Sequence[str] = PROMPTS,
    width: int = 512,
    height: int = 512,
    runs: int = 3,
    warm_up: int = 1,
    steps: int | None = None,
    load: float | None = None,
    quality: Callable[[Tensor], float] | None = None,
    check: Check = go_on,
) -> Bench:
    """Draw `runs` pictures one by one, after `warm_up` that do not count, and time them.

    The prompts are taken in turn, each with a seed of its own, and read anew each time. `model` is its name and `load`
    the seconds that loading it took. `quality` judges a picture (H, W, 3) in [0, 1]. NextStepError, before anything is
    drawn, for what cannot be.
    """
    runs, warm_up = RUNS.check(runs), WARM_UP.check(warm_up)
    if not prompts:
        raise NextStepError("There is nothing to draw: give at least one prompt.")
    engine, device = pipeline.engine, pipeline.device
    settings = engine.recommended().override(steps=steps)
    grid = engine.grid(height, width)
    job = engine.make_job([Caption(prompts[0])], grid, settings, seed=0)
    forget_peak(device)
    times, judged = [], []
    for seed, prompt in enumerate(islice(cycle(prompts), warm_up + runs)):
        taken, picture = _draw(pipeline, prompt, width, height, settings.steps, seed, check)
        if seed >= warm_up:
            times.append(taken)
            judged += [] if quality is None else [float(quality(picture))]
    peak, of = peak_memory(device)  # before the bandwidth's buffers
    limit = BUFFER_BYTES if pipeline.max_memory is None else pipeline.max_memory // 4
    rate = bandwidth(device, min(BUFFER_BYTES, limit)).bytes_per_second
    calls = settings.calls(job.total)
    sizes, length = tensor_bytes(engine.model), job.rows.ids.shape[1]
    read = token_bytes(engine.config, sizes, job.batch, length, job.total, calls, pipeline.dtype).token
    token, picture_seconds = (Spread.of([getattr(t, part) for t in times]) for part in ("token", "picture"))
    formats = sorted({layer.format.name for _, layer in quantized_linears(engine.model)})
    return Bench(
        nextstep=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        kind=kind_of(device),
        device=device_name(device),
        model=model,
        weights="+".join(formats) or str(pipeline.dtype).removeprefix("torch."),
        dtype=str(pipeline.dtype).removeprefix("torch."),
        width=width,
        height=height,
        tokens=job.total,
        sampler=settings.sampler,
        steps=settings.steps,
        cfg=settings.cfg,
        max_memory=pipeline.max_memory,
        runs=runs,
        warm_up=warm_up,
        load=load,
        prompt=Spread.of([t.prompt for t in times]),
        token=token,
        vae=Spread.of([t.vae for t in times]),
        picture=picture_seconds,
        pictures_per_minute=60 / picture_seconds.median,
        tokens_per_second=1 / token.median,
        quality=Spread.of(judged) if judged else None,
        token_bytes=read,
        bandwidth=rate,
        floor=read / rate,
        share=read / rate / token.median,
        streamed=model_bytes(engine.model) - held_bytes(engine.model, device) if device.type != "cpu" else 0,
        peak_memory=peak,
        peak_memory_of=of,
    )


@dataclass(frozen=True)
class _Taken:
    """Seconds of one picture and its parts."""

    prompt: float
    token: float
    vae: float
    picture: float


def _draw(
    pipeline: NextStepPipeline, prompt: str, width: int, height: int, steps: int, seed: int, check: Check
) -> tuple[_Taken, Tensor]:
    """One picture (H, W, 3) and what it took. A device is waited for after the first token and the last alone."""
    if pipeline.engine.caches.prefilled is not None:
        pipeline.engine.caches.prefilled.clear()
    marks: list[float] = []
    tokens = 0

    def seen(progress: Progress) -> None:
        nonlocal tokens
        tokens = progress.total
        if progress.done in (1, progress.total):
            wait(pipeline.device)
            marks.append(time.perf_counter())

    started = time.perf_counter()
    drawn = pipeline.generate(prompt, width=width, height=height, steps=steps, seed=seed, callback=seen, check=check)
    ended = time.perf_counter()
    first, last = marks[0], marks[-1]
    token = (last - first) / (tokens - 1) if tokens > 1 else first - started
    prompt_seconds = max(0.0, first - started - token) if tokens > 1 else 0.0
    return _Taken(prompt_seconds, token, ended - last, ended - started), drawn.images[0]
