"""Devices and their memory: how much there is, what is free, how to give back what is kept and keep to a limit."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from .memory import spare_bytes


def best_device() -> torch.device:
    """The first that there is of a CUDA (or ROCm) card, an Apple GPU and the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def kind_of(device: torch.device) -> str:
    """What people call the device: CUDA, ROCm, MPS or CPU."""
    if device.type == "cuda":
        return "ROCm" if torch.version.hip else "CUDA"
    return device.type.upper()


def current(device: torch.device) -> AbstractContextManager[None]:
    """Inside, kernels start on `device`: by themselves they start on the current card, which may be another."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def device_name(device: torch.device) -> str:
    """The processor that computes, and the CPU threads where it is the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU of {_cpu_name()}"
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def total_bytes(device: torch.device) -> int | None:
    """Memory that a device has in all, or None where that cannot be asked."""
    with suppress(RuntimeError, OSError):
        if device.type == "cuda":
            return int(torch.cuda.get_device_properties(device).total_memory)
        if device.type == "mps" and torch.backends.mps.is_available():
            return int(torch.mps.recommended_max_memory())
        if device.type == "cpu":
            return host_bytes()
    return None


def host_bytes() -> int | None:
    """Memory that the computer has in all, or None where that cannot be asked, as on Windows."""
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a device has free, or None where that cannot be asked."""
    with suppress(RuntimeError):  # of a device that is not well after an error
        if device.type == "cuda":
            return int(torch.cuda.mem_get_info(device)[0])
        if device.type == "cpu":
            return spare_bytes() if spare_bytes() < sys.maxsize else None
    return None


def room_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on a device, what PyTorch keeps for itself included; None where that
    cannot be asked."""
    free = free_bytes(device)
    if free is None or device.type != "cuda":
        return free
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def give_back(device: torch.device) -> None:
    """Hand back to the system what PyTorch keeps of a device's memory without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps" and torch.backends.mps.is_available():
        torch.mps.empty_cache()


@contextmanager
def capped(device: torch.device, limit: int | None, held: int) -> Iterator[None]:
    """Inside, a CUDA device refuses what would take us beyond `limit` bytes, of which we hold `held` already.

    What others in this process hold does not count. A refusal is an error of the device's own kind, after which less
    is done at once. Other devices cannot be told.
    """
    if limit is None or device.type != "cuda":
        yield
        return
    give_back(device)
    others = max(0, torch.cuda.memory_reserved(device) - held)
    total = torch.cuda.get_device_properties(device).total_memory
    # What newer versions tell; older ones have nobody else who would have set it.
    before = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (others + limit) / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


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
    import resource  # which Windows lacks

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "process, loading included"
