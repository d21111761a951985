"""The device's own time for a few calls."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nextstep_core.runtime.bandwidth import timed
from nextstep_core.runtime.capture import CudaRecorder


def device_seconds(calls: Sequence[Callable[[], Tensor]], device: torch.device, repeat: int) -> float:
    """Median seconds of all calls, one after another.

    On CUDA they are captured, as a model's are, so that the host's part does not count; what cannot be captured is
    called as it is.
    """

    def run() -> Tensor:
        for call in calls[:-1]:
            call()
        return calls[-1]()

    replay: Callable[[], Any] = _captured(run, device) if device.type == "cuda" else run
    replay()
    return statistics.median(timed(device, replay)[0] for _ in range(repeat))


def _captured(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Any]:
    recorder = CudaRecorder(device)
    recorder.warm_up(run)
    try:
        return recorder.record(run)
    except RuntimeError as reason:
        print(f"not captured, so the host's time counts too: {str(reason).splitlines()[0]}")
        return run
