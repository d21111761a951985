"""Which product is fastest for which way to store a matrix: ours, plain ones, and torchao's where it is installed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextstep_core.runtime.cpu import PackedLinear
from nextstep_core.runtime.quantization.formats import FP8, INT4, INT8
from nextstep_core.runtime.quantization.products import candidates

SIDE, MATRICES, ROWS = 1536, 24, 2  # the flow head's blocks, for one picture with guidance


@dataclass(frozen=True)
class KernelTime:
    """Milliseconds for all matrices, one after another."""

    stored: str
    product: str
    milliseconds: float


def kernel_times(device: torch.device, repeat: int) -> list[KernelTime]:
    """Time every product that works on `device`; what fails there is left out."""
    matrices = [torch.randn(SIDE, SIDE, device=device) * 0.02 for _ in range(MATRICES)]
    x = torch.randn(ROWS, SIDE, device=device)
    found: list[KernelTime] = []

    def add(stored: str, product: str, make: Callable[[Tensor], Callable[[], Tensor]]) -> None:
        try:
            calls = [make(matrix) for matrix in matrices]
            found.append(KernelTime(stored, product, _milliseconds(calls, device, repeat)))
        except Exception as reason:  # a device's or a library's own kinds of failure
            print(f"{stored}, {product}: not here ({str(reason).splitlines()[0][:80]})")

    for dtype in (torch.float32, torch.bfloat16):
        rows, name = x.to(dtype), str(dtype).removeprefix("torch.")
        add(name, "plain", lambda m, rows=rows: partial(F.linear, rows, m.to(rows.dtype)))
    if device.type == "cpu":
        add("float32", "oneDNN's layout", lambda m: partial(PackedLinear(_linear(m)), x))
    rows = x.bfloat16()
    for format in (INT8, INT4, FP8):
        for kernel in candidates(format, device.type):

            def make(matrix: Tensor, format=format, kernel=kernel) -> Callable[[], Tensor]:
                weight, scale = format.quantize(matrix)
                return partial(kernel.run, rows, kernel.packed(weight), scale)

            add(format.name, kernel.name, make)
    add("int8", "torchao, weight only", lambda m: _torchao(m.bfloat16(), rows))
    return found


def _linear(matrix: Tensor) -> nn.Linear:
    layer = nn.Linear(SIDE, SIDE, bias=False, device="meta")
    layer.weight = nn.Parameter(matrix, requires_grad=False)
    return layer


def _torchao(matrix: Tensor, rows: Tensor) -> Callable[[], Tensor]:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(_linear(matrix))
    quantize_(model, Int8WeightOnlyConfig())
    return partial(model, rows)


def _milliseconds(calls: list[Callable[[], Tensor]], device: torch.device, repeat: int) -> float:
    times = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        for call in calls:
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def show_kernels(found: list[KernelTime]) -> None:
    """Print a table, the fastest first."""
    print(f"{MATRICES} matrices of {SIDE}x{SIDE}, {ROWS} rows")
    for row in sorted(found, key=lambda row: row.milliseconds):
        print(f"{row.stored:10}{row.product:36}{row.milliseconds:10.2f} ms")
