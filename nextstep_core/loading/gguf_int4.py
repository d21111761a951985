"""Blocks of GGUF files that are groups of our int4 already: brought into its layout, with their own scales.

Q4_0, Q4_1 and Q4_K hold 4 bits for each number and a scale and a zero for every 32. Turned into floats and quantized
again they would lose as much as in the first place; so integers stay what they are, and scales and zeros are rounded to
our dtype, which is the hundredth part of what 4 bits lose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..runtime.quantization import QuantizedLinear
from ..runtime.quantization.formats import INT4_32, SCALE_DTYPE, quantize_in_pieces
from . import gguf_file
from .checkpoint import Derived, TensorFiles

PIECE = 512  # rows that are taken apart at once
GROUP = INT4_32.group

# Of blocks (rows, n, bytes): the integers (rows, n * numbers in a block), and scale and zero (rows, groups) of each 32.
Values: TypeAlias = Callable[[Tensor], Tensor]
Scales: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]


def _halves(data: Tensor) -> Tensor:
    """Numbers in two bytes each, as floats."""
    return data.contiguous().view(torch.float16).float()


def _split(data: Tensor) -> Tensor:
    """The low halves of the bytes of each block (rows, n, m), then the high ones."""
    return torch.cat([data & 15, data >> 4], dim=-1)


def _q4_0_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    scale = _halves(blocks[..., :2]).flatten(1)
    return scale, torch.zeros_like(scale)


def _q4_1_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    scale, low = _halves(blocks[..., :4]).unbind(-1)
    return scale, low + 8 * scale


def _q4_k_values(blocks: Tensor) -> Tensor:
    """Every 32 bytes hold two groups, the first in their low halves."""
    return _split(blocks[..., 16:].unflatten(-1, (-1, GROUP)))


def _q4_k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight offsets of 6 bits, in 12 bytes: the first four of each in the low bits of the first eight,
    the others' low bits in the last four and their high bits in the high ones of the first eight."""
    scale, offset = _halves(blocks[..., :4]).unsqueeze(-1).unbind(-2)
    first, second, last = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([first & 63, last & 15 | first >> 2 & 48], dim=-1)
    offsets = torch.cat([second & 63, last >> 4 | second >> 2 & 48], dim=-1)
    scale = scale * scales
    return scale.flatten(1), (8 * scale - offset * offsets).flatten(1)


# By the name of the kind: bytes of a block, and how it is taken apart.
KINDS: dict[str, tuple[int, Values, Scales]] = {
    "Q4_0": (18, lambda blocks: _split(blocks[..., 2:]), _q4_0_scales),
    "Q4_1": (20, lambda blocks: _split(blocks[..., 4:]), _q4_1_scales),
    "Q4_K": (144, _q4_k_values, _q4_k_scales),
}


def weight_of(blocks: gguf_file.Blocks) -> Tensor:
    """The weight of int4 for a matrix in one of KINDS."""
    size, values, _ = KINDS[blocks.kind]
    rows, columns = blocks.shape
    weight = torch.empty(rows, columns // 2, dtype=torch.uint8)
    for start in range(0, rows, PIECE):
        piece = values(_raw(blocks, start, size)).flatten(1)
        weight[start : start + PIECE] = piece[:, ::2] << 4 | piece[:, 1::2]
    return weight


def scale_of(blocks: gguf_file.Blocks) -> Tensor:
    """Its scales and zeros."""
    size, _, scales = KINDS[blocks.kind]
    rows, columns = blocks.shape
    whole = torch.empty(columns // GROUP, rows, 2, dtype=SCALE_DTYPE)
    for start in range(0, rows, PIECE):
        piece = torch.stack(scales(_raw(blocks, start, size)), dim=2)
        whole[:, start : start + PIECE] = piece.transpose(0, 1)
    return whole


def _raw(blocks: gguf_file.Blocks, start: int, size: int) -> Tensor:
    """The blocks (rows, n, bytes) of a piece of a matrix."""
    piece = torch.from_numpy(np.array(blocks.raw[start : start + PIECE]))
    return piece.view(len(piece), -1, size)


def with_own_scales(files: TensorFiles, layers: Mapping[str, QuantizedLinear]) -> TensorFiles:
    """The files with weight and scale of those `layers` that int4 in groups of 32 holds as the file does.

    The other parts of a fused layer, of which a part is held so, are quantized.
    """
    wanted = {f"{name}.weight": layer for name, layer in layers.items() if layer.format == INT4_32}
    kinds: dict[Path, dict[str, str]] = {}
    locations, shapes, dtypes = dict(files.locations), dict(files.shapes), dict(files.dtypes)

    def is_int4(path: Path, name: str) -> bool:
        if path.suffix != gguf_file.SUFFIX:
            return False
        if path not in kinds:
            kinds[path] = gguf_file.kinds(path)
        return kinds[path][name] in KINDS

    for name, layer in wanted.items():
        places = [source for source in files.locations[name] if isinstance(source, tuple)]
        held = [is_int4(*place) for place in places]
        if len(places) < len(files.locations[name]) or not any(held):
            continue
        for own, like, as_held, part in (
            (name, layer.weight, weight_of, 0),
            (f"{name}_scale", layer.weight_scale, scale_of, 1),
        ):
            makes = (as_held if same else partial(_quantized, part) for same in held)
            locations[own] = tuple(Derived((place,), make) for place, make in zip(places, makes))
            shapes[own], dtypes[own] = tuple(like.shape), like.dtype
    return replace(files, locations=locations, shapes=shapes, dtypes=dtypes)


def _quantized(part: int, matrix: Tensor) -> Tensor:
    """Weight (0) or scale (1) of a matrix in another format, which may be rows that become floats piece by piece."""
    return quantize_in_pieces(INT4_32, matrix)[part]
