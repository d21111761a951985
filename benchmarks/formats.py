"""How much each weight format changes the network: relative error of its two outputs against float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nextstep_core.errors import NextStepError
from nextstep_core.loading.build import make_ready
from nextstep_core.model.nextstep import NextStepModel
from nextstep_core.model.transformer import whole_span
from nextstep_core.runtime.quantization import RECIPES, quantize_model

from .subjects import Subject

FORMATS = ("bf16", *RECIPES)
LENGTH = 64
ROWS = 2
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
    """Random inputs of a model: embeds (rows, length, hidden), and noisy tokens (times, rows * length, token_dim)."""

    embeds: Tensor
    noisy: Tensor


def probe_for(subject: Subject, device: torch.device) -> Probe:
    """A prompt's first half, then image tokens of unit variance, as a trained model's are."""
    config, generator = subject.config, torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (ROWS, LENGTH // 2), generator=generator)
    tokens = torch.randn(ROWS, LENGTH // 2, config.token_dim, generator=generator).to(device)
    noisy = torch.randn(len(TIMES), ROWS * LENGTH, config.token_dim, generator=generator).to(device)
    text = subject.engine.text_embedding(ids).to(device=device, dtype=torch.float32)
    return Probe(torch.cat([text, subject.model.image_in_projector(tokens)], dim=1), noisy)


def condition(model: NextStepModel, probe: Probe, dtype: torch.dtype) -> Tensor:
    """The out-projected hidden states `c`, (rows * length, hidden) float32."""
    valid = torch.ones(probe.embeds.shape[:2], dtype=torch.bool, device=probe.embeds.device)
    hidden = model(probe.embeds.to(dtype), whole_span(model.config, valid, dtype))
    return model.image_out_projector(hidden).flatten(0, 1).float()


def velocity(model: NextStepModel, probe: Probe, c: Tensor, dtype: torch.dtype) -> Tensor:
    """Velocities of the noisy tokens at all TIMES for the conditions `c`, float32."""
    codes = model.head.time_embed(torch.tensor(TIMES, device=c.device), dtype)[:, None]
    return model.head.velocity(probe.noisy.to(dtype), model.head.modulations(codes, c.to(dtype))).float()


def relative(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth|."""
    return float((value - truth).norm() / truth.norm())


@torch.inference_mode()
def format_errors(subject: Subject, device: torch.device) -> Iterator[FormatError]:
    """One row per format; the subject must be in float32, as it was loaded.

    Everything but the weights of the format stays in float32 (bf16 is all in bfloat16), and the kernels are those of a
    run on `device`, with what they round. Both velocities get the float32 `c`.
    """
    probe = probe_for(subject, device)
    c = condition(subject.model, probe, torch.float32)
    v = velocity(subject.model, probe, c, torch.float32)
    for name in FORMATS:
        dtype = torch.bfloat16 if name == "bf16" else torch.float32
        model = copy.deepcopy(subject.model).to(dtype)
        try:
            if name != "bf16":
                quantize_model(model, name, device)
                make_ready(model, device, dtype)
            errors = relative(condition(model, probe, dtype), c), relative(velocity(model, probe, c, dtype), v)
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
