"""Which product is fastest for which way to store a matrix: ours, plain ones, and torchao's where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextstep_core.runtime.cpu import PackedLinear
from nextstep_core.runtime.quantization.formats import FP8, INT4, INT8
from nextstep_core.runtime.quantization.products import racing, usual

from .clock import device_seconds

Product: TypeAlias = Callable[[], Tensor]


@dataclass(frozen=True)
class Matrices:
    """`count` matrices (outputs, inputs), together more than a cache holds, each times `rows` rows."""

    outputs: int
    inputs: int
    count: int
    rows: int

    def __str__(self) -> str:
        return f"{self.count} matrices of {self.outputs}x{self.inputs}, {self.rows} rows"


HEAD = Matrices(1536, 1536, 24, rows=2)  # the flow head's blocks, for one picture with guidance


@dataclass(frozen=True)
class KernelTime:
    """Milliseconds for all matrices, one after another, and the bytes of their weights as they are stored."""

    stored: str
    product: str
    milliseconds: float
    bytes: int

    @property
    def rate(self) -> float:
        """Stored bytes per second."""
        return self.bytes / (1e-3 * self.milliseconds)


def kernel_times(device: torch.device, repeat: int, shape: Matrices = HEAD) -> list[KernelTime]:
    """Time every product that works on `device`; what fails there is left out."""
    matrices = [torch.randn(shape.outputs, shape.inputs, device=device) * 0.02 for _ in range(shape.count)]
    x = torch.randn(shape.rows, shape.inputs, device=device)
    found: list[KernelTime] = []

    def add(stored: str, product: str, make: Callable[[Tensor], tuple[Product, int]]) -> None:
        try:
            products, sizes = zip(*map(make, matrices))
            seconds = device_seconds(products, device, repeat)
            found.append(KernelTime(stored, product, 1e3 * seconds, sum(sizes)))
        except Exception as reason:  # a device's or a library's own kinds of failure
            print(f"{stored}, {product}: not here ({str(reason).splitlines()[:1]})")

    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        add(name, "plain", partial(_plain, x.to(dtype)))
    if device.type == "cpu":
        add("float32", "oneDNN's layout", lambda m: (partial(PackedLinear(_linear(m)), x), m.nbytes))
    rows = x.bfloat16()
    for format in (INT8, INT4, FP8):
        known = usual(format, device.type)
        for kernel in [*known, *racing(format, known[0], format.quantize(matrices[0])[0])]:
            if not kernel.takes(shape.rows) or kernel.missing(device) is not None:
                continue

            def make(matrix: Tensor, format=format, kernel=kernel) -> tuple[Product, int]:
                weight, scale = format.quantize(matrix)
                stored = kernel.packed(weight), kernel.packed_scale(scale)
                return partial(kernel.run, rows, *stored), weight.nbytes + scale.nbytes

            add(format.name, kernel.name, make)
    add("int8", "torchao, weight only", lambda m: (_torchao(m.bfloat16(), rows), m.numel()))
    return found


def _plain(rows: Tensor, matrix: Tensor) -> tuple[Product, int]:
    weight = matrix.to(rows.dtype)
    return partial(F.linear, rows, weight), weight.nbytes


def _linear(matrix: Tensor) -> nn.Linear:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(matrix, requires_grad=False)
    return layer


def _torchao(matrix: Tensor, rows: Tensor) -> Product:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(_linear(matrix))
    quantize_(model, Int8WeightOnlyConfig())
    return partial(model, rows)


def show_kernels(found: list[KernelTime], shape: Matrices = HEAD) -> None:
    """Print a table, the fastest first."""
    print(shape)
    for row in sorted(found, key=lambda row: row.milliseconds):
        print(f"{row.stored:10}{row.product:36}{row.milliseconds:10.2f} ms{1e-9 * row.rate:10.0f} GB/s")
