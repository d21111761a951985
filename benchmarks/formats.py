"""How much each weight format changes the network: relative error of its two outputs against float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nextstep_core.errors import NextStepError
from nextstep_core.loading.build import make_ready
from nextstep_core.loading.calibration import Drawn, conditions, relative_error
from nextstep_core.model.nextstep import NextStepModel
from nextstep_core.request.layout import Caption
from nextstep_core.runtime.quantization import RECIPES, quantize_model
from training.evaluate import held_out_singles
from training.scenes import SQUARE

from .subjects import Subject
from .timing import Case

FORMATS = ("bf16", *RECIPES)
PROMPTS = 12
SIDE = 64  # pixels
TIMES = (0.0, 0.25, 0.5, 0.75, 0.96)


@dataclass(frozen=True)
class FormatError:
    """Relative errors (Euclidean norm) of `c` and of the head's velocity, or why there are none."""

    model: str
    format: str
    condition: float | None = None
    velocity: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Probe:
    """What a model drew, and noisy tokens (times, rows * tokens, token_dim) on the way to more of it."""

    drawn: Drawn
    noisy: Tensor


@torch.inference_mode()
def probe_for(subject: Subject, device: torch.device) -> Probe:
    """What the subject draws of held-out captions or, where it reads none, of ids: inputs as in use.

    Random ids and noise in the place of tokens would do for no trained model: what it never sees, it is not made for.
    """
    engine = subject.engine
    if subject.reads:
        captions = [Caption(text, ()) for text, _, _ in held_out_singles(PROMPTS, 0, SQUARE)]
        seeds = list(range(len(captions)))
        job = engine.make_job(captions, engine.grid(SIDE, SIDE), subject.settings, seed=seeds)
    else:
        job = Case(subject, SIDE, SIDE, PROMPTS, subject.settings, 32, device, torch.float32, engine.caches).job(0)
    *_, progress = engine.decode(job, device, torch.float32)
    drawn = Drawn(job.rows.ids, job.rows.valid, progress.tokens.cpu(), job.grid)
    generator, places = torch.Generator().manual_seed(0), len(drawn.ids) * job.total
    noise = torch.randn(len(TIMES), places, subject.config.token_dim, generator=generator).to(device)
    whole = progress.tokens.repeat(len(drawn.ids) // job.pictures, 1, 1).flatten(0, 1)
    times = torch.tensor(TIMES, device=device)[:, None, None]
    return Probe(drawn, (1 - times) * noise + times * whole)


def condition(model: NextStepModel, subject: Subject, probe: Probe, dtype: torch.dtype) -> Tensor:
    """What the transformer hands to the head, (rows * tokens, hidden) float32."""
    return conditions(model, subject.engine.text_embedding, probe.drawn, dtype).flatten(0, 1)


def velocity(model: NextStepModel, probe: Probe, c: Tensor, dtype: torch.dtype) -> Tensor:
    """Velocities of the noisy tokens at all TIMES for the conditions `c`, float32."""
    codes = model.head.time_embed(torch.tensor(TIMES, device=c.device), dtype)[:, None]
    return model.head.velocity(probe.noisy.to(dtype), model.head.modulations(codes, c.to(dtype))).float()


@torch.inference_mode()
def format_errors(subject: Subject, device: torch.device) -> Iterator[FormatError]:
    """One row per format; the subject must be in float32, as it was loaded.

    Everything but the weights of the format stays in float32 (bf16 is all in bfloat16), and the kernels are those of a
    run on `device`, with what they round. Both velocities get the float32 `c`.
    """
    probe = probe_for(subject, device)
    c = condition(subject.model, subject, probe, torch.float32)
    v = velocity(subject.model, probe, c, torch.float32)
    for name in FORMATS:
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        model = copy.deepcopy(subject.model).to(dtype)
        try:
            if name != "bf16":
                quantize_model(model, name, device)
                make_ready(model, device, dtype)
            found = condition(model, subject, probe, dtype), velocity(model, probe, c, dtype)
            errors = tuple(map(relative_error, found, (c, v)))
        except (NextStepError, RuntimeError) as error:  # of a device that cannot hold the format
            yield FormatError(subject.name, name, reason=str(error).splitlines()[0])
        else:
            yield FormatError(subject.name, name, *errors)


def show_errors(errors: list[FormatError]) -> None:
    """Print the rows."""
    print(f"{'model':16}{'format':12}{'error of c':>12}{'of velocity':>14}")
    for row in errors:
        numbers = row.reason or f"{row.condition:12.2e}{row.velocity:14.2e}"
        print(f"{row.model:16}{row.format:12}{numbers}")
