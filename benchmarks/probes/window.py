"""Several positions through the transformer in one pass, against one position."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from nextstep_core.decoding.steps import StepShape, TransformerStep
from nextstep_core.model.kv_cache import bucketed

from ..clock import device_seconds
from ..timing import Case


@torch.inference_mode()
def window_times(case: Case, positions: Sequence[int], repeat: int) -> list[dict[str, Any]]:
    """Milliseconds of a pass in the middle of a picture, for each number of positions; the first is the measure."""
    step = TransformerStep(case.subject.model, StepShape.of_job(case.job(seed=0), case.device, case.dtype))
    start = case.prompt_length + case.tokens // 2
    rows: list[dict[str, Any]] = []
    for count in positions:
        embeds = torch.randn(case.rows, count, case.subject.config.hidden_size, device=case.device, dtype=case.dtype)
        places = torch.arange(start, start + count, device=case.device)
        forward = partial(step.run, embeds, places, bucketed(start + count))
        milliseconds = 1e3 * device_seconds([forward], case.device, repeat)
        first = rows[0]["milliseconds"] if rows else milliseconds
        rows.append({"positions": count, "milliseconds": milliseconds, "times_one": milliseconds / first})
    return rows
