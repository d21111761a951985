"""How fast a device goes through its memory, and how long it takes for a piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

BUFFER_BYTES = 1 << 29
BANDWIDTH_RUNS = 8


def timed(device: torch.device, function: Callable[[], T]) -> tuple[float, T]:
    """Seconds that `function` takes until the device is done, and what it returned."""
    wait(device)
    started = time.perf_counter()
    result = function()
    wait(device)
    return time.perf_counter() - started, result


def wait(device: torch.device) -> None:
    """Until a device has done all that it was told."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":  # which card, as the current one may be another
        getattr(torch, device.type).synchronize(device)


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second between memory and processor, and what was run to see it."""

    bytes_per_second: float
    method: str


def bandwidth(device: torch.device, size: int = BUFFER_BYTES) -> Bandwidth:
    """The fastest of a few plain ways to go through `size` bytes, with torch's present number of CPU threads.

    A CPU's copy is left out: whether its target is read before it is written depends on the processor.
    """
    side = int((size // 4) ** 0.5)
    buffer = torch.ones(side, side, device=device)
    if device.type == "cpu":
        vector = torch.ones(side)
        ways: dict[str, tuple[Callable[[], object], int]] = {
            "read: sum": (buffer.sum, buffer.nbytes),
            "read: maximum": (buffer.max, buffer.nbytes),
            "read: matrix times vector": (lambda: buffer @ vector, buffer.nbytes),
        }
    else:
        target = torch.empty_like(buffer)
        ways = {"copy on the device, read and write counted": (lambda: target.copy_(buffer), 2 * buffer.nbytes)}
    rates = {
        name: size / min(timed(device, way)[0] for _ in range(BANDWIDTH_RUNS)) for name, (way, size) in ways.items()
    }
    best = max(rates, key=rates.__getitem__)
    return Bandwidth(rates[best], best)
