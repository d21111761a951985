"""The flow head alone: what a step of it costs, and what a token costs besides its steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from nextstep_core.decoding.loop import guidance_scales
from nextstep_core.decoding.steps import StepShape
from nextstep_core.runtime.bandwidth import timed

from ..timing import Case


@torch.inference_mode()
def head_times(case: Case, steps: Sequence[int], repeat: int) -> dict[str, Any]:
    """Milliseconds of a token's sampling for each number of steps, and the line through them."""
    rows = [{"steps": count, "milliseconds": 1e3 * _seconds(case, count, repeat)} for count in steps]
    line = statistics.linear_regression(*zip(*((row["steps"], row["milliseconds"]) for row in rows)))
    return {"samplings": rows, "milliseconds_a_step": line.slope, "milliseconds_besides": line.intercept}


def _seconds(case: Case, steps: int, repeat: int) -> float:
    case = replace(case, settings=case.settings.override(steps=steps))
    job = case.job(seed=0)
    _, sample = case.caches.steps(case.subject.model, StepShape.of_job(job, case.device, case.dtype))
    hidden = torch.randn(case.rows, case.subject.config.hidden_size, device=case.device, dtype=case.dtype)
    noise = job.noise.for_token(sample.noise_count).to(case.device)
    guidance = guidance_scales(case.settings, 1, case.device)[0]
    sample(hidden, noise, guidance)
    return statistics.median(timed(case.device, lambda: sample(hidden, noise, guidance))[0] for _ in range(repeat))
