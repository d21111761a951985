"""Two models on one device: both draw, one is unloaded, and the other draws what it drew before."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from ..timing import Case, time_picture


def pair_draws(make: Callable[[], Case]) -> dict[str, Any]:
    """Seconds of the first model's picture before and after the second went, and whether it is the same."""
    first, second = make(), make()
    time_picture(first, seed=0)
    time_picture(second, seed=0)
    before, tokens = time_picture(first, seed=0)
    wanted = tokens.clone()
    second.subject.engine.release()
    del second
    gc.collect()
    if first.device.type == "cuda":
        torch.cuda.empty_cache()
    after, tokens = time_picture(first, seed=0)
    return {"seconds_before": before, "seconds_after": after, "same": torch.equal(tokens, wanted)}
