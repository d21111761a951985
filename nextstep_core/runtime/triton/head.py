"""A flow step in two launches for each block of the head, and three around them.

The head's matrices are small: a product takes less time than its launch, and what stands between two products takes
several. Here layer norm and modulation are computed by every program that multiplies, for itself, and what follows a
product is done where the product ends. A program holds whole rows of the matrix, so that each is read once for all
rows of x. `model/flow_head.py` has the same in plain math.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ...model.flow_head import NORM_EPS, FlowHead
from ..layers import is_plain
from .reading import Linear, linear, vector
from .rows import INT4, fp8_to_float
from .support import MOST_ROWS, bits, launch, power_of_two

WIDEST = 4096  # columns of a matrix, of which a program holds whole rows
TILE = 4  # rows of a matrix in a program
MOST_TERMS = 4  # of a solver's update


@triton.jit
def _whole_rows(w, n, N, K, FORMAT: tl.constexpr, KP: tl.constexpr):
    k = tl.arange(0, KP)
    held = (n < N)[:, None] & (k < K)[None, :]
    tile = tl.load(w + n.to(tl.int64)[:, None] * K + k[None, :], mask=held, other=0)
    if FORMAT == 2:
        return fp8_to_float(tile)
    return tile.to(tl.float32)


@triton.jit
def _finished(total, scale, bias, n, N, FORMAT: tl.constexpr, BIAS: tl.constexpr):
    if FORMAT != 0:
        total = total * tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    return total


@triton.jit
def modulated(
    h,
    gain,
    offset,
    modulation,
    w,
    scale,
    bias,
    out,
    N,
    K,
    step,
    eps,
    AFFINE: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    KP: tl.constexpr,
):
    """out (ROWS, N) = w times (LayerNorm(h) * factor + shift), through SiLU where that is wanted.

    modulation (ROWS, step) begins with shift (K) and factor (K); gain and offset (K,) are the layer norm's own.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, KP)
    inside = k < K
    matrix = _whole_rows(w, n, N, K, FORMAT, KP)
    for m in tl.static_range(ROWS):
        x = tl.load(h + m * K + k, mask=inside, other=0.0).to(tl.float32)
        off = tl.where(inside, x - tl.sum(x, 0) / K, 0.0)
        u = off / tl.sqrt(tl.sum(off * off, 0) / K + eps)
        if AFFINE:
            u = u * tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
            u += tl.load(offset + k, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(modulation + m * step + k, mask=inside, other=0.0).to(tl.float32)
        u = u * tl.load(modulation + m * step + K + k, mask=inside, other=0.0).to(tl.float32) + shift
        total = _finished(tl.sum(matrix * u[None, :], 1), scale, bias, n, N, FORMAT, BIAS)
        if SILU:
            total = total * tl.sigmoid(total)
        tl.store(out + m * N + n, total.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def gated(
    x,
    modulation,
    w,
    scale,
    bias,
    h,
    N,
    K,
    step,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    SOURCES: tl.constexpr,
    BN: tl.constexpr,
    KP: tl.constexpr,
):
    """h (ROWS, N) += gate * (w times x), gate being the third part of modulation (ROWS, step).

    Without GATED h becomes the product alone. Row m takes row m % SOURCES of x, rounded as h is.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.arange(0, KP)
    matrix = _whole_rows(w, n, N, K, FORMAT, KP)
    for m in tl.static_range(ROWS):
        source = x + (m % SOURCES) * K
        u = tl.load(source + k, mask=k < K, other=0.0).to(h.dtype.element_ty).to(tl.float32)
        total = _finished(tl.sum(matrix * u[None, :], 1), scale, bias, n, N, FORMAT, BIAS)
        if GATED:
            gate = tl.load(modulation + m * step + 2 * N + n, mask=n < N, other=0.0).to(tl.float32)
            total = tl.load(h + m * N + n, mask=n < N, other=0.0).to(tl.float32) + gate * total
        tl.store(h + m * N + n, total.to(h.dtype.element_ty), mask=n < N)


@triton.jit
def advance(
    velocity,
    guidance,
    guided,
    out,
    first,
    second,
    third,
    by_velocity,
    by_first,
    by_second,
    by_third,
    SIZE,
    DIM,
    PICTURES,
    each,
    BRANCHES: tl.constexpr,
    OTHERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Guidance of velocity (BRANCHES * SIZE) as `sampling.guidance.guide` does it, kept in `guided` (SIZE), and the
    solver's next state `out`: it and up to three other tensors, each with its factor.

    guidance (2, PICTURES) has cfg and cfg_img of each picture, or (2,) the same for all, where `each` is 0.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = i < SIZE
    v = tl.load(velocity + i, mask=held, other=0.0).to(tl.float32)
    if BRANCHES > 1:
        picture = i // DIM * each
        cfg = tl.load(guidance + picture, mask=held, other=0.0).to(tl.float32)
        last = tl.load(velocity + (BRANCHES - 1) * SIZE + i, mask=held, other=0.0).to(tl.float32)
        if BRANCHES == 2:
            v = last + cfg * (v - last)
        else:
            image = tl.load(velocity + SIZE + i, mask=held, other=0.0).to(tl.float32)
            by_image = tl.load(guidance + 1 + picture + each * (PICTURES - 1), mask=held, other=0.0).to(tl.float32)
            v = last + by_image * (image - last) + cfg * (v - image)
    tl.store(guided + i, v, mask=held)
    total = by_velocity * v
    if OTHERS > 0:
        total += by_first * tl.load(first + i, mask=held, other=0.0)
    if OTHERS > 1:
        total += by_second * tl.load(second + i, mask=held, other=0.0)
    if OTHERS > 2:
        total += by_third * tl.load(third + i, mask=held, other=0.0)
    tl.store(out + i, total, mask=held)


@dataclass(frozen=True)
class Block:
    """A residual block: its layer norm's weight, bias and eps, and its two linear layers."""

    gain: Tensor
    offset: Tensor
    eps: float
    first: Linear
    second: Linear


@dataclass(frozen=True)
class HeadWeights:
    """All that a flow step multiplies by."""

    input: Linear
    blocks: tuple[Block, ...]
    final: Linear

    @classmethod
    def of(cls, head: FlowHead, device: torch.device, dtype: torch.dtype) -> HeadWeights | None:
        """None where a layer of the head is something that the kernels cannot stand in for."""
        blocks, own_blocks = [], cast("Iterable[Any]", head.res_blocks)
        for block in own_blocks:
            norm = block.in_ln
            gain, offset = vector(norm.weight, device), vector(norm.bias, device)
            first, second = (_held(layer, device, dtype) for layer in (block.mlp[0], block.mlp[2]))
            if not is_plain(norm) or gain is None or offset is None or first is None or second is None:
                return None
            blocks.append(Block(gain, offset, float(norm.eps), first, second))
        outer = [_held(layer, device, dtype) for layer in (head.input_proj, head.final_layer.linear)]
        if outer[0] is None or outer[1] is None:
            return None
        return cls(outer[0], tuple(blocks), outer[1])


def _held(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> Linear | None:
    """A linear layer whose rows a program can hold whole."""
    found = linear(layer, device, dtype)
    return found if found is not None and found.matrix.code != INT4 and found.matrix.columns <= WIDEST else None


def _tensors(weights: Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, scale and bias; where there is none, the weight stands for it."""
    weight, scale = bits(weights.matrix.weight), weights.matrix.scale
    return weight, weight if scale is None else scale, weight if weights.bias is None else weights.bias


def _flags(weights: Linear) -> dict[str, Any]:
    matrix, wide = weights.matrix, power_of_two(weights.matrix.columns)
    return {"BIAS": weights.bias is not None, "FORMAT": matrix.code, "BN": TILE, "KP": wide, "num_warps": 4}


def _programs(weights: Linear) -> tuple[int]:
    return (triton.cdiv(weights.matrix.rows, TILE),)


def velocities(head: HeadWeights, x: Tensor, modulations: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """`FlowHead.velocity` of noisy tokens x (M, token_dim), the same in every branch: (branches * M, token_dim) in
    `dtype`, for modulations (branches * M, ...) of one step."""
    rows, dim = len(modulations[0]), head.input.matrix.rows
    assert rows <= MOST_ROWS
    h = torch.empty(rows, dim, device=x.device, dtype=dtype)
    y = torch.empty_like(h)
    weights = head.input
    shared: dict[str, Any] = {"ROWS": rows, **_flags(weights)}
    columns = weights.matrix.columns
    launch(
        gated, _programs(weights), x, x, *_tensors(weights), h, dim, columns, 0, GATED=False, SOURCES=len(x), **shared
    )
    for block, modulation in zip(head.blocks, modulations):
        weights, step = block.first, modulation.stride(0)
        launch(
            modulated,
            _programs(weights),
            h,
            block.gain,
            block.offset,
            modulation,
            *_tensors(weights),
            y,
            dim,
            dim,
            step,
            block.eps,
            AFFINE=True,
            SILU=True,
            ROWS=rows,
            **_flags(weights),
        )
        weights = block.second
        shared = {"ROWS": rows, "SOURCES": rows, **_flags(weights)}
        launch(gated, _programs(weights), y, modulation, *_tensors(weights), h, dim, dim, step, GATED=True, **shared)
    weights, modulation = head.final, modulations[-1]
    out = torch.empty(rows, weights.matrix.rows, device=x.device, dtype=dtype)
    launch(
        modulated,
        _programs(weights),
        h,
        h,
        h,
        modulation,
        *_tensors(weights),
        out,
        weights.matrix.rows,
        dim,
        modulation.stride(0),
        NORM_EPS,
        AFFINE=False,
        SILU=False,
        ROWS=rows,
        **_flags(weights),
    )
    return out


def guide_and_advance(
    velocity: Tensor, branches: int, guidance: Tensor, by_velocity: float, others: Sequence[tuple[Tensor, float]]
) -> tuple[Tensor, Tensor]:
    """The guided velocity (M, D) of velocity (branches * M, D), and the next state: it and the others, at most
    `MOST_TERMS` in all, each times its factor. All but velocity are float32."""
    pictures, dim = len(velocity) // branches, velocity.shape[-1]
    guided = torch.empty(pictures, dim, device=velocity.device, dtype=torch.float32)
    out = torch.empty_like(guided)
    padded = [*others, *[(guided, 0.0)] * (MOST_TERMS - 1 - len(others))]
    launch(
        advance,
        (triton.cdiv(guided.numel(), 128),),
        velocity,
        guidance,
        guided,
        out,
        *(tensor for tensor, _ in padded),
        float(by_velocity),
        *(float(factor) for _, factor in padded),
        guided.numel(),
        dim,
        pictures,
        int(guidance.ndim > 1),
        BRANCHES=branches,
        OTHERS=len(others),
        BLOCK=128,
        num_warps=4,
    )
    return guided, out
