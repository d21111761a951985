"""The one exception type that leaves the engine, and telling what a device's own errors mean. Imports no torch.

Every message is a sentence for the person at the screen.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class NextStepError(ValueError):
    """Something about a checkpoint, a prompt or a setting is wrong; the message says what and what to do."""


def damaged(path: Path, reason: object) -> NextStepError:
    """The error for a file that cannot be read as what it should be."""
    return NextStepError(f"{path} is damaged or incomplete ({reason}). Delete it and download it again.")


def not_finite(what: str) -> NextStepError:
    """The error for a stage of drawing whose result is not a number; no picture can come of it."""
    return NextStepError(
        f"{what} holds NaN or infinite values, so there is no picture. Choose another dtype (bf16 or fp32); if that "
        "changes nothing, the weights are damaged: download them again."
    )


SHOWN = 80  # characters of a text, digits of a number


def shown(value: object) -> str:
    """A value as a message shows it: short, whatever it is."""
    if isinstance(value, str):
        return repr(value) if len(value) <= SHOWN else f"{value[:SHOWN]!r}... ({len(value):,} characters)"
    if isinstance(value, int) and abs(value) >= 10**SHOWN:  # Python itself refuses to print some of these
        return f"a number of {len(f'{value:x}') * 1.2:,.0f} digits"
    if value is None or isinstance(value, (bool, int)):
        return str(value)
    if isinstance(value, float):
        return float.__repr__(value).removesuffix(".0")
    return f"a {type(value).__name__}"


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """NextStepError, naming the choices, when `value` is none of them."""
    choices = list(choices)
    if value not in choices:
        raise NextStepError(f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}.")


OUT_OF_MEMORY_SIGNS = (
    "out of memory",  # CUDA, ROCm, XPU, MPS
    "invalid buffer size",  # MPS, for a single tensor that is larger than the device can hold
    "status_alloc_failed",  # cuBLAS and cuDNN
    "can't allocate memory",  # the host's allocator
    "not enough memory",  # the same on Windows
)


CUDA_OUT_OF_MEMORY = 2  # in a newer torch's error of any call to CUDA, whose text is the driver's


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether less work at once would have gone through, whatever the device calls it."""
    import torch

    of_cuda = isinstance(error, getattr(torch, "AcceleratorError", ()))
    return (
        isinstance(error, torch.OutOfMemoryError)
        or (of_cuda and getattr(error, "error_code", None) == CUDA_OUT_OF_MEMORY)
        or any(sign in str(error).lower() for sign in OUT_OF_MEMORY_SIGNS)
    )
