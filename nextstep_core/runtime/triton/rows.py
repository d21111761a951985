"""A few rows times a matrix, reading the matrix once for all of them, with what stands before and after it.

For rows x the kernel gives x W^T or, as parts of a transformer's layer, RMSNorm before it, and after it the sum with
what was there, or silu(gate) * up. Matrices are floats, int8 or fp8 with a scale for each row, or int4 with a scale and
a zero for each group of columns, as `quantization/formats.py` lays them out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantization.formats import Format, Int4, PerRow
from .support import bits, launch, power_of_two

FLOATS, INT8, FP8, INT4 = 0, 1, 2, 3
TILES = {False: 8, True: 32}  # rows of the matrix in a program, and those for tensor cores
DOT_ROWS = 5  # from so many rows on they are padded to 16 and go through the tensor cores


@triton.jit
def fp8_to_float(byte):
    """e4m3fn from its bits: the fields moved to where float32 has them, and the exponent's bias corrected."""
    magnitude = ((byte & 127).to(tl.int32) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    magnitude = tl.where((byte & 127) == 127, float("nan"), magnitude)
    return tl.where(byte >= 128, -magnitude, magnitude)


@triton.jit
def _matrix(w, scale, n, start, N, K, FORMAT: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Rows n and columns from `start` of a matrix (N, K), (BN, BK) float32; a row's own scale is left out."""
    rows = n.to(tl.int64)[:, None]
    if FORMAT == 3:
        half = start // 2 + tl.arange(0, BK // 2)
        held = (n < N)[:, None] & (half < K // 2)[None, :]
        packed = tl.load(w + rows * (K // 2) + half[None, :], mask=held, other=0).to(tl.int32)
        # The bits of 2^23 + q in float32 are those of 2^23 and of q, side by side: no conversion is needed.
        even = ((packed >> 4) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
        odd = ((packed & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
        values = tl.interleave(even, odd)
        group = start // GROUP + tl.arange(0, BK // GROUP)
        known = (n < N)[:, None] & (group < K // GROUP)[None, :]
        pair = scale + (group[None, :] * N + rows) * 2
        factor = tl.load(pair, mask=known, other=0.0).to(tl.float32)[:, :, None]
        zero = tl.load(pair + 1, mask=known, other=0.0).to(tl.float32)[:, :, None]
        factor = tl.reshape(tl.broadcast_to(factor, [BN, BK // GROUP, GROUP]), [BN, BK])
        zero = tl.reshape(tl.broadcast_to(zero, [BN, BK // GROUP, GROUP]), [BN, BK])
        return values * factor + zero
    k = start + tl.arange(0, BK)
    held = (n < N)[:, None] & (k < K)[None, :]
    tile = tl.load(w + rows * K + k[None, :], mask=held, other=0)
    if FORMAT == 2:
        return fp8_to_float(tile)
    return tile.to(tl.float32)


@triton.jit
def _sums(
    x,
    w,
    scale,
    gain,
    n,
    N,
    K,
    eps,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    RP: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The products (RP, BN) of all rows of x, after their RMSNorm, with rows n of the matrix."""
    m = tl.arange(0, RP)
    squares = tl.zeros([RP, BK], tl.float32)
    if NORM and DOT:  # before it is rounded, as what is not normalized may be too large for float16
        for start in tl.range(0, K, BK):
            k = start + tl.arange(0, BK)
            held = (m < ROWS)[:, None] & (k < K)[None, :]
            numbers = tl.load(x + m[:, None] * K + k[None, :], mask=held, other=0.0).to(tl.float32)
            squares += numbers * numbers
        inverse = 1.0 / tl.sqrt(tl.sum(squares, 1) / K + eps)
    if DOT:
        out = tl.zeros([RP, BN], tl.float32)
    else:
        parts = tl.zeros([RP, BN, BK], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        held = (m < ROWS)[:, None] & (k < K)[None, :]
        tile = tl.load(x + m[:, None] * K + k[None, :], mask=held, other=0.0)
        numbers = tile.to(tl.float32)
        if NORM:
            if DOT:
                numbers = numbers * inverse[:, None]
            else:
                squares += numbers * numbers
            numbers = numbers * tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        matrix = _matrix(w, scale, n, start, N, K, FORMAT, GROUP, BN, BK)
        if DOT:
            out = tl.dot(numbers.to(tile.dtype), tl.trans(matrix.to(tile.dtype)), out, input_precision="ieee")
        else:
            parts += numbers[:, None, :] * matrix[None, :, :]
    if not DOT:
        out = tl.sum(parts, 2)
        if NORM:
            out = out / tl.sqrt(tl.sum(squares, 1) / K + eps)[:, None]
    if FORMAT == 1 or FORMAT == 2:
        out = out * tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return out


@triton.jit
def few_rows(
    x,
    w,
    scale,
    bias,
    gain,
    kept,
    out,
    N,
    K,
    eps,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    RP: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out (ROWS, N) = x (ROWS, K) times w (N, K).

    NORM: x goes through RMSNorm with the weight `gain` (K,). ADDS: `kept` (ROWS, N) is added; it may be `out`. GATED:
    w has N rows of gate and N of up in this order (2 N, K), and out is silu(gate) * up.
    """
    M = N * 2 if GATED else N
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    first = n
    if GATED:  # a row of the next half is none of ours
        first = tl.where(n < N, n, M)
    total = _sums(x, w, scale, gain, first, M, K, eps, NORM, ROWS, RP, FORMAT, GROUP, BN, BK, DOT, STAGES)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        up = _sums(x, w, scale, gain, N + n, M, K, eps, NORM, ROWS, RP, FORMAT, GROUP, BN, BK, DOT, STAGES)
        if BIAS:
            up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        total = total * tl.sigmoid(total) * up
    m = tl.arange(0, RP)
    places = m[:, None] * N + n[None, :]
    held = (m < ROWS)[:, None] & (n < N)[None, :]
    if ADDS:
        total += tl.load(kept + places, mask=held, other=0.0).to(tl.float32)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=held)


@dataclass(frozen=True)
class Matrix:
    """A matrix (rows, columns) as it is stored: `weight` and, where its format has one, `scale`."""

    weight: Tensor
    scale: Tensor | None
    rows: int
    columns: int
    code: int
    group: int = 1

    @classmethod
    def of(cls, format: Format | None, weight: Tensor, scale: Tensor | None) -> Matrix | None:
        """None where the kernel does not know the format; format None is plain floats."""
        if format is None and weight.is_floating_point() and weight.is_contiguous():
            return cls(weight, None, len(weight), weight.shape[1], FLOATS)
        if scale is None or not weight.is_contiguous():
            return None
        if isinstance(format, PerRow) and format.dtype in (torch.int8, torch.float8_e4m3fn):
            return cls(weight, scale, len(weight), weight.shape[1], INT8 if format.dtype == torch.int8 else FP8)
        if isinstance(format, Int4) and format.group in (32, 64, 128):
            return cls(weight, scale, len(weight), 2 * weight.shape[1], INT4, format.group)
        return None


def product(
    x: Tensor,
    matrix: Matrix,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    plus: Tensor | None = None,
) -> Tensor:
    """Rows x (M, columns), of at most `MOST_ROWS`, times the matrix, in the dtype of x; the options are those of
    `few_rows`: the weight of an RMSNorm before, a gate, and what is added."""
    count, rows = len(x), matrix.rows // 2 if gated else matrix.rows
    out = torch.empty(count, rows, device=x.device, dtype=x.dtype)
    dot = count >= DOT_ROWS
    padded = 16 if dot else power_of_two(count)
    tile, numbers = TILES[dot], 4096 if matrix.code == FLOATS else 8192
    # On the way a program holds a sum for every number of its tile and every row, and must not run out of registers.
    wide = 128 if dot else min(512, max(64, numbers // (8 * padded)))
    weight = bits(matrix.weight)
    launch(
        few_rows,
        (triton.cdiv(rows, tile),),
        x.contiguous(),
        weight,
        weight if matrix.scale is None else matrix.scale,
        x if bias is None else bias,
        x if norm is None else norm,
        x if plus is None else plus,
        out,
        rows,
        matrix.columns,
        eps,
        NORM=norm is not None,
        BIAS=bias is not None,
        GATED=gated,
        ADDS=plus is not None,
        ROWS=count,
        RP=padded,
        FORMAT=matrix.code,
        GROUP=matrix.group,
        BN=tile,
        BK=max(wide, matrix.group),
        DOT=dot,
        STAGES=3,
        num_warps=4,
    )
    return out
