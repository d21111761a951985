"""How long a device takes for a few calls, without the host's part in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .bandwidth import timed
from .capture import CudaRecorder

Call: TypeAlias = Callable[[], Tensor]


class Lap:
    """All of a few calls, one after another, as often as asked; `recorded` holds them in one CUDA graph.

    What cannot be captured raises when it is made.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device, recorded: bool) -> None:
        self._calls, self._device = calls, device
        self._replay: Callable[[], None] | None = None
        self._recorder = CudaRecorder(device) if recorded else None
        if self._recorder is not None:
            self._last = self._recorder.warm_up(self._run)
            self._replay = self._recorder.record(self._keep)

    def _run(self) -> Tensor:
        for call in self._calls[:-1]:
            call()
        return self._calls[-1]()

    def _keep(self) -> None:
        self._last.copy_(self._run())

    def __call__(self) -> tuple[float, Tensor]:
        """Seconds of all calls, and what the last one gave."""
        if self._replay is None:
            return timed(self._device, self._run)
        seconds, _ = timed(self._device, self._replay)
        return seconds, self._last


def captures(device: torch.device) -> bool:
    """Whether work on a device runs in graphs, so that what cannot be captured is of no use there."""
    return device.type == "cuda" and torch.version.hip is None
