"""One way to multiply by a quantized matrix: what it reads, and how."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..trials import nothing_missing
from .formats import Format, rotate
from .layouts import Layout

Product: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]

PLAIN = "plain"  # the name of the product with floats that stand for the stored numbers
TOLERANCE = 0.02  # of a product's norm, against the plain one
AS_STORED = None, None  # `lies` of a kernel that reads weight and scale as a format has them
OWN_VERSION = "1"  # of what is written here


@dataclass(frozen=True)
class Kernel:
    """run(x, weight, scale): rows x (M, columns) times the matrix, (M, rows), in the dtype of x.

    `pack` and `pack_scale` bring a format's weight and scale into the layout that `run` reads, on the device where it
    runs; None where it is the format's own. `layout` is that of the weight, where the way back is known. It takes up to
    `most_rows`, None for any number. `version` is that of the code behind it, and `missing` says what a device lacks.
    """

    name: str
    run: Product
    pack: Callable[[Tensor], Tensor] | None = None
    layout: Layout | None = None
    pack_scale: Callable[[Tensor], Tensor] | None = None
    most_rows: int | None = None
    version: str = f"{torch.__version__} {OWN_VERSION}"
    missing: Callable[[torch.device], str | None] = nothing_missing

    def packed(self, weight: Tensor) -> Tensor:
        """A format's weight in the layout of this kernel."""
        return weight if self.pack is None else self.pack(weight)

    def packed_scale(self, scale: Tensor) -> Tensor:
        """A format's scale in the layout of this kernel."""
        return scale if self.pack_scale is None else self.pack_scale(scale)

    @property
    def lies(self) -> Hashable:
        """Equal for kernels that read the same weight and scale."""
        return self.pack, self.pack_scale

    def takes(self, rows: int) -> bool:
        """Whether it multiplies so many rows."""
        return self.most_rows is None or rows <= self.most_rows


def plain(format: Format) -> Kernel:
    """The product that all others are compared with: it works for all formats on all devices."""

    def run(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, format.dequantize(weight, scale, x.dtype))

    return Kernel(PLAIN, run)


def unpacked(kernel: Kernel, format: Format, name: str) -> Kernel:
    """The plain product with what `kernel` reads: faster for many rows where its product goes through the weights once
    for a few of them. Only where its layout is known and its scale lies as the format says."""
    assert kernel.layout is not None and kernel.pack_scale is None
    layout = kernel.layout

    def run(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, format.dequantize(layout.unpack(weight), scale, x.dtype))

    return replace(kernel, name=name, run=run, most_rows=None)


def padded(kernel: Kernel, rows: int, name: str) -> Kernel:
    """`kernel` with empty rows below fewer than `rows`: what it makes of them may suit a processor better."""

    def run(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return kernel.run(F.pad(x, (0, 0, 0, rows - len(x))), weight, scale)[: len(x)]

    return replace(kernel, name=name, run=run, most_rows=rows - 1)


def of_rotated(kernel: Kernel, group: int) -> Kernel:
    """`kernel` of the inner format, for a matrix whose columns were rotated in groups."""

    def run(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return kernel.run(rotate(x, group), weight, scale)

    return replace(kernel, run=run)


def by_rows(few: Mapping[int, Kernel], beyond: Kernel) -> Kernel:
    """Takes, for a number of rows, the kernel of the next number in `few`, and `beyond` above. All read the same."""
    limits = sorted(few)
    while limits and few[limits[-1]].run == beyond.run:
        limits.pop()
    if not limits:
        return beyond

    def run(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        limit = next((limit for limit in limits if len(x) <= limit), None)
        return (beyond if limit is None else few[limit]).run(x, weight, scale)

    parts = [*(f"{few[limit].name} up to {limit} rows" for limit in limits), beyond.name]
    return replace(beyond, name=", ".join(parts), run=run)
