"""What happens where memory runs out for good: one sentence that says what was needed and what there was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import OutOfMemory, is_out_of_memory
from .devices import free_bytes
from .memory import format_bytes

CPU = torch.device("cpu")
REASON_LENGTH = 200
ADVICE = "Choose a smaller size or fewer pictures, quantization int8 or int4, or close other programs."
LOADING_ADVICE = "Choose quantization int8 or int4, or close other programs."


@contextmanager
def told(work: str, device: torch.device = CPU, needed: int | None = None, advice: str = ADVICE) -> Iterator[None]:
    """Inside, memory that runs out on `device` is an OutOfMemory that names `work` and the bytes that it needs.

    It is raised when the device's own error is gone, whose traceback would hold on to all that was allocated.
    """
    try:
        yield
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = reason_of(error)
    size = "more memory than there is" if needed is None else f"about {format_bytes(needed)} of memory"
    free = free_bytes(device)
    there = "" if free is None else f", and {device} has {format_bytes(free)} free"
    raise OutOfMemory(f"{work} needs {size}{there} ({reason}). {advice}")


def reason_of(error: Exception) -> str:
    """What the device said, which tells how much it was asked for; the first line of it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:REASON_LENGTH].rstrip(". ")
