"""Half of the layers on the host: what a token costs then, and whether the memory stays within the plan."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from nextstep_core.runtime.bandwidth import timed
from nextstep_core.runtime.devices import forget_peak, peak_memory
from nextstep_core.runtime.streaming import streamed_bytes

from ..timing import Case


@torch.inference_mode()
def streaming_times(case: Case, tokens: int) -> dict[str, Any]:
    """Seconds a token and bytes a second over the bus; planned and used device memory. The layers stay on the host."""
    model, engine = case.subject.model, case.subject.engine
    for layer in model.layers[::2]:
        layer.to("cpu")
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
    away = sum(p.nbytes for layer in model.layers[::2] for p in layer.parameters())
    resident = sum(p.nbytes for p in model.parameters()) - away
    others = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("layers."))
    vae = sum(p.nbytes for p in case.subject.vae.parameters())
    job = case.job(seed=0)
    working = engine.working_bytes(job, case.dtype) + streamed_bytes(model) - others
    forget_peak(case.device)
    run = engine.decode(job, case.device, case.dtype)
    next(run)  # the prompt, and what is made once
    seconds, drawn = timed(case.device, lambda: sum(1 for _ in islice(run, tokens)))
    run.close()
    used, _ = peak_memory(case.device)
    seconds /= drawn
    return {
        "layers_on_the_host": len(model.layers[::2]),
        "bytes_a_token": away,
        "seconds_a_token": seconds,
        "bytes_per_second": away / seconds,
        "planned_bytes": resident + working,
        "used_bytes": None if case.device.type != "cuda" or used is None else used - vae,
    }
