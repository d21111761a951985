"""How a matrix is stored in fewer bits: integers or small floats, with scales that are chosen for the least error.

Scales are rounded to bfloat16 before the integers are fitted to them, so that rounding them costs nothing. Files of
other programs were fitted to finer scales, which are kept in float32. The layout of int4 (value = (q - 8) * scale +
zero, per group of columns) is that of PyTorch's packed int4 products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ..interrupt import Check, go_on
from .search import search

Device: TypeAlias = torch.device | str | None  # None is PyTorch's default

SCALE_DTYPE = torch.bfloat16
PIECE = 512  # rows
TINY = 1e-8  # stands in for the scale of rows that are all zero


class Format(Protocol):
    """A way to store a matrix (rows, columns) as `weight` and `scale`."""

    @property
    def name(self) -> str:
        """What users call it."""

    def fits(self, rows: int, columns: int) -> bool:
        """Whether a matrix of this shape can be stored so."""

    def empty(self, rows: int, columns: int, device: Device) -> tuple[Tensor, Tensor]:
        """Uninitialized weight and scale of the right shapes and dtypes."""

    def quantize(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and scale of a floating-point matrix, on its device; rows do not depend on each other."""

    def dequantize(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The matrix (rows, columns) that weight and scale stand for."""


@dataclass(frozen=True)
class PerRow:
    """One scale for every row: weight (rows, columns), scale (rows,). `top` is the largest magnitude of the dtype."""

    name: str
    dtype: torch.dtype
    top: float
    scale_dtype: torch.dtype = SCALE_DTYPE

    def fits(self, rows: int, columns: int) -> bool:
        return True

    def empty(self, rows: int, columns: int, device: Device) -> tuple[Tensor, Tensor]:
        weight = torch.empty(rows, columns, dtype=self.dtype, device=device)
        return weight, torch.empty(rows, dtype=self.scale_dtype, device=device)

    def quantize(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        matrix = matrix.float()
        scale = (matrix.abs().amax(dim=1) / self.top).clamp_min(TINY).to(self.scale_dtype)
        scaled = (matrix / scale.float()[:, None]).clamp_(-self.top, self.top)
        return (scaled if self.dtype.is_floating_point else scaled.round_()).to(self.dtype), scale

    def dequantize(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype) * scale.to(dtype)[:, None]


def row_steps(x: Tensor, top: float) -> Tensor:
    """(M, 1): what each row of float32 x (M, columns) is divided by so that its greatest magnitude becomes `top`."""
    greatest: Tensor = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True)
    return greatest.clamp_min(TINY) / top


@dataclass(frozen=True)
class Int4:
    """Groups of `group` columns share a scale and a zero: weight (rows, columns / 2) uint8 holds two values in a byte,
    the even column's in the high half; scale (columns / group, rows, 2) holds [scale, zero]."""

    name: str
    group: int
    scale_dtype: torch.dtype = SCALE_DTYPE

    def fits(self, rows: int, columns: int) -> bool:
        return columns % self.group == 0 and rows % 16 == 0

    def empty(self, rows: int, columns: int, device: Device) -> tuple[Tensor, Tensor]:
        weight = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
        return weight, torch.empty(columns // self.group, rows, 2, dtype=self.scale_dtype, device=device)

    def quantize(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        groups = matrix.float().view(len(matrix), -1, self.group)
        scale, zero = search(groups, self.scale_dtype)
        values = ((groups - zero.float()) / scale.float()).round_().add_(8).clamp_(0, 15).to(torch.uint8)
        return self.stored(values.view(len(matrix), -1), scale[..., 0], zero[..., 0])

    def stored(self, values: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and scale as they are stored, of the integers 0..15 (rows, columns) uint8, and of the scales and zeros
        (rows, columns / group)."""
        pairs = torch.stack([scale, zero], dim=2).to(self.scale_dtype)
        return values[:, ::2] << 4 | values[:, 1::2], pairs.transpose(0, 1).contiguous()

    def dequantize(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        factor, zero = scale.to(dtype).transpose(0, 1)[..., None].unbind(2)
        values = (self.values(weight).to(dtype) - 8).view(len(weight), -1, self.group)
        return (values * factor + zero).view(len(weight), -1)

    def values(self, weight: Tensor) -> Tensor:
        """The integers 0..15 in their own columns, (rows, columns) uint8."""
        return torch.stack([weight >> 4, weight & 15], dim=2).view(len(weight), -1)


@dataclass(frozen=True)
class Rotated:
    """The format `inner` of a matrix whose columns were rotated, each group of them, by a Hadamard matrix.

    Rotating spreads outliers over their group, so that fewer bits are lost on them (ConvRot). The inputs are rotated
    alike; the rotation is its own inverse.
    """

    inner: PerRow | Int4
    rotated: int  # columns in a group, a power of 4

    @property
    def name(self) -> str:
        return f"{self.inner.name}, rotated"

    def fits(self, rows: int, columns: int) -> bool:
        return columns % self.rotated == 0 and self.inner.fits(rows, columns)

    def empty(self, rows: int, columns: int, device: Device) -> tuple[Tensor, Tensor]:
        return self.inner.empty(rows, columns, device)

    def quantize(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.quantize(rotate(matrix.float(), self.rotated))

    def dequantize(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        # in float32: a sum over the whole group
        return rotate(self.inner.dequantize(weight, scale, torch.float32), self.rotated).to(dtype)


def rotate(x: Tensor, group: int) -> Tensor:
    """x (..., columns) with every `group` columns multiplied by the Hadamard matrix of that size."""
    return torch.matmul(x.unflatten(-1, (-1, group)), _hadamard(group, x.device, x.dtype)).flatten(-2)


@lru_cache(maxsize=16)
def _hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The regular, symmetric, orthonormal Hadamard matrix (size, size); size is a power of 4."""
    four = 0.5 * torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix.to(device, dtype)


def quantize_in_pieces(format: Format, matrix: Tensor, check: Check = go_on) -> tuple[Tensor, Tensor]:
    """What `format.quantize` gives, a few rows at a time: the floats in between never need much memory.

    `check` is called before each piece and may raise to stop.
    """
    rows, columns = matrix.shape
    weight, scale = format.empty(rows, columns, matrix.device)
    for start in range(0, len(matrix), PIECE):
        check()
        piece = slice(start, start + PIECE)
        weight[piece], scale[piece if scale.ndim == 1 else (slice(None), piece)] = format.quantize(matrix[piece])
    return weight, scale


INT8 = PerRow("int8", torch.int8, 127.0)
FP8 = PerRow("fp8", torch.float8_e4m3fn, 448.0)
INT4 = Int4("int4", 64)
INT4_32 = Int4("int4-g32", 32)
INT4_128 = Int4("int4-g128", 128)
