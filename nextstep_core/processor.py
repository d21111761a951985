"""What this machine's processor is good at, measured once."""

from __future__ import annotations

import logging
import time
from functools import cache

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)

SIDE = 1536  # of the flow head's matrices, which a CPU spends its time on
MATRICES = 8
CALLS = 5


@cache
def fastest_dtype() -> torch.dtype:
    """float32 or bfloat16, whichever multiplies two rows faster on the CPU (for lack of bf16 units it is float32)."""
    seconds = {dtype: _seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = min(seconds, key=seconds.__getitem__)
    log.info("CPU: %s", ", ".join(f"{dtype} {1e3 * s:.1f} ms" for dtype, s in seconds.items()) + f"; using {best}")
    return best


def _seconds(dtype: torch.dtype) -> float:
    """The fastest of a few passes over more matrices than a cache holds."""
    x = torch.randn(2, SIDE).to(dtype)
    matrices = [torch.randn(SIDE, SIDE).to(dtype) for _ in range(MATRICES)]
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        for matrix in matrices:
            F.linear(x, matrix)
        times.append(time.perf_counter() - started)
    return min(times)
