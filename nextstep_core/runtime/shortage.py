"""What happens where memory runs out for good: one sentence that says what was needed and what there was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import OutOfMemory, is_out_of_memory
from ..sentences import Sentence
from .devices import free_bytes
from .memory import format_bytes

CPU = torch.device("cpu")
REASON_LENGTH = 200
ADVICE = Sentence("Choose a smaller size or fewer pictures, quantization int8 or int4, or close other programs.")
LOADING_ADVICE = Sentence("Choose quantization int8 or int4, or close other programs.")


@contextmanager
def told(
    work: Sentence, device: torch.device = CPU, needed: int | None = None, advice: Sentence = ADVICE
) -> Iterator[None]:
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
    size = Sentence("more memory than there is")
    if needed is not None:
        size = Sentence("about {bytes} of memory", bytes=format_bytes(needed))
    free = free_bytes(device)
    if free is None:
        raise OutOfMemory(
            "{work} needs {size} ({reason}). {advice}", work=work, size=size, reason=reason, advice=advice
        )
    raise OutOfMemory(
        "{work} needs {size}, and {device} has {free} free ({reason}). {advice}",
        work=work,
        size=size,
        device=device,
        free=format_bytes(free),
        reason=reason,
        advice=advice,
    )


def reason_of(error: Exception) -> str:
    """What the device said, which tells how much it was asked for; the first line of it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:REASON_LENGTH].rstrip(". ")
