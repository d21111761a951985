"""Facts about the machine: its name, how fast it reads memory, and how much memory was in use."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

BUFFER_BYTES = 1 << 29
BANDWIDTH_RUNS = 8


def machine(device: torch.device) -> str:
    """The processor that computes, and the CPU threads where it is the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def timed(device: torch.device, function: Callable[[], T]) -> tuple[float, T]:
    """Seconds that `function` takes until the device is done, and what it returned."""
    _wait(device)
    started = time.perf_counter()
    result = function()
    _wait(device)
    return time.perf_counter() - started, result


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second between memory and processor, and what was run to see it."""

    bytes_per_second: float
    method: str


def bandwidth(device: torch.device) -> Bandwidth:
    """The fastest of a few plain ways to go through memory, with torch's present number of CPU threads.

    A CPU's copy is left out: whether its target is read before it is written depends on the processor.
    """
    side = int((BUFFER_BYTES // 4) ** 0.5)
    buffer = torch.ones(side, side, device=device)
    if device.type == "cpu":
        vector = torch.ones(side)
        ways = {
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


def forget_peak(device: torch.device) -> None:
    """Start the device's peak anew, so that loading does not count; a process's peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> tuple[int | None, str]:
    """Most bytes in use so far and whose they are; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "device, while measuring"
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024, "process, loading included"
    if sys.platform == "win32":
        return None, "not known on this system"
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "process, loading included"
