"""Our own kernels against the plain steps, as they are tried before they are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from nextstep_core.decoding.fused import OwnKernels
from nextstep_core.decoding.steps import StepShape, TokenSampler, TokenSequence, WindowStep
from nextstep_core.runtime.chosen import Chooser

from ..timing import Case


@torch.inference_mode()
def own_times(case: Case, positions: Sequence[int]) -> list[dict[str, Any]]:
    """What the trials show of a step of so many positions, and of a flow step; none where nothing can be tried."""
    chooser = Chooser(case.device)
    hasten = OwnKernels(lambda device: chooser)
    shape = StepShape.of_job(case.job(seed=0), case.device, case.dtype)
    sequence = TokenSequence(case.subject.model, shape)
    hasten(sequence._plain, 1)
    for length in positions:
        if length > 1:
            hasten(WindowStep(sequence._plain), length)
            wide = replace(shape, rows=shape.rows * length)
            TokenSampler(case.subject.model, wide, hasten=hasten)
    TokenSampler(case.subject.model, shape, hasten=hasten)
    return [
        {
            "what": outcome.what,
            "kernel": verdict.name,
            "verdict": verdict.verdict,
            "microseconds": None if verdict.seconds is None else 1e6 * verdict.seconds,
            "plain": 1e6 * outcome.plain,
            "error": verdict.error,
            "reason": verdict.reason,
        }
        for outcome in chooser.used.values()
        for verdict in outcome.verdicts
    ]
