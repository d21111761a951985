"""What a CPU is good at: the dtype that it multiplies fastest, and float32 matrices in a layout that it reads well."""

from __future__ import annotations

import logging
import time
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .interrupt import Check, go_on

log = logging.getLogger(__name__)

SIDE = 1536  # of the flow head's matrices, which a CPU spends its time on
MATRICES = 8
CALLS = 5
WIDE = 1 << 20  # elements of a matrix; below, there is nothing to gain
SMALL_MODEL = 10**8  # parameters; below, no dtype makes a CPU noticeably faster
LAYOUT_ROWS = 2  # the layout is made for so many, a picture with guidance, and serves any number


def cpu_dtype(parameters: int, free: int) -> torch.dtype:
    """What a CPU with `free` bytes should store and compute a model of so many parameters in."""
    if parameters * torch.float32.itemsize > free:
        return torch.bfloat16
    return fastest_dtype() if parameters > SMALL_MODEL else torch.float32


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


class PackedLinear(nn.Module):
    """A float32 linear layer in oneDNN's own layout: for few rows its product uses all threads, which BLAS does not."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), LAYOUT_ROWS)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


def pack_linears(model: nn.Module, check: Check = go_on) -> None:
    """Give a model's wide float32 layers the packed layout, in place, where PyTorch was built with oneDNN.

    `check` is called before each layer and may raise to stop.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for name, layer in list(model.named_modules()):
        check()
        if isinstance(layer, nn.Linear) and layer.weight.numel() >= WIDE and layer.weight.dtype == torch.float32:
            model.set_submodule(name, PackedLinear(layer))
