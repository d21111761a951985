"""Whether kernels can run on a device, and how one is started."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..devices import current

VERSION = "1"  # of all kernels: raise it with any change to one, and devices try them again
OLDEST = (7, 5)  # compute capability of the oldest NVIDIA cards that the kernels are compiled for in the tests
MOST_ROWS = 16  # rows of a product; above, turning the weights into floats once costs less

Launch = Callable[..., None]


def missing(device: torch.device) -> str | None:
    """What `device` lacks for these kernels; None where nothing."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if interpreted():
        return None
    if device.type != "cuda":
        return "Triton compiles for NVIDIA and AMD"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        return "the card is older than Turing"
    return None


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on any device, as tests make it do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start `kernel` on the device of its first argument, which need not be the current one."""
    with current(arguments[0].device):
        kernel[grid](*arguments, **constants)


def power_of_two(number: int) -> int:
    """The next power of two that is not smaller."""
    return 1 << max(0, number - 1).bit_length()


def bits(weight: Tensor) -> Tensor:
    """A weight as kernels take it: 8-bit floats as bytes, as older cards have no such type."""
    return weight.view(torch.uint8) if weight.dtype == torch.float8_e4m3fn else weight
