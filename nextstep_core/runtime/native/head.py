"""A flow step of the head with int8 matrices in one call, by `head.c`.

In the published size a product takes 30 microseconds, and what stands between two products is eight calls that take
longer. `model/flow_head.py` has the same in plain math.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...model.flow_head import NORM_EPS, FlowHead
from ..layers import is_plain
from ..quantization import QuantizedLinear
from ..quantization.formats import PerRow
from . import compiler
from .rows import INT8_COLUMNS, INT8_ROWS

SOURCE = Path(__file__).with_name("head.c")
VERSION = compiler.version_of(SOURCE)
DTYPES = torch.float32, torch.bfloat16


class _Block(ctypes.Structure):
    """A residual block as C has it."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("gain", "offset", "first", "first_scale", "first_bias", "second", "second_scale", "second_bias")
    ]


class NativeHead:
    """What the flow head multiplies by, as C takes it: integers as they are stored, all else in float32."""

    def __init__(self, blocks: list[list[Tensor]], outer: list[Tensor]) -> None:
        self._blocks, self._outer = blocks, outer  # held, for what is handed to C are their addresses
        self.dim, self.token = outer[0].shape
        rows = [_Block(*(tensor.data_ptr() for tensor in block)) for block in blocks]
        self._array = (_Block * len(rows))(*rows)

    @classmethod
    def of(cls, head: FlowHead, dtype: torch.dtype) -> NativeHead | None:
        """None where a layer of the head is something that C cannot stand in for."""
        blocks: list[list[Tensor]] = []
        for block in cast("Any", head.res_blocks):
            norm, linears = block.in_ln, (block.mlp[0], block.mlp[2])
            if not (is_plain(norm) and norm.eps == NORM_EPS and all(map(_is_held, linears))):
                return None
            vectors = [vector.detach().float().contiguous() for vector in (norm.weight, norm.bias)]
            blocks.append([*vectors, *(part for layer in linears for part in _parts(layer))])
        outer = head.input_proj, head.final_layer.linear
        if dtype not in DTYPES or not all(_is_plain_linear(layer) for layer in outer):
            return None
        return cls(
            blocks, [part.detach().float().contiguous() for layer in outer for part in (layer.weight, layer.bias)]
        )

    def velocity(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """`FlowHead.velocity` of x (rows, token_dim) in `DTYPES`, with modulations (rows, ...) of the same dtype."""
        count, x = len(x), x.contiguous()
        held = [modulation.contiguous() for modulation in modulations]
        widths = [3 * self.dim] * len(self._blocks) + [2 * self.dim]
        if (
            [one.shape for one in held] != [(count, width) for width in widths]
            or x.shape[1] != self.token
            or not x.is_cpu
        ):
            raise ValueError(f"no flow step in C for {tuple(x.shape)} and {[tuple(one.shape) for one in held]}")
        if x.dtype not in DTYPES or any(one.dtype != x.dtype for one in held):
            raise ValueError(f"no flow step in C for {x.dtype} and {held[0].dtype}")
        out = torch.empty_like(x)
        room = torch.empty(count * (14 * self.dim + 4 * self.token + 12) + 64, dtype=torch.uint8)
        addresses = (ctypes.c_void_p * len(held))(*(one.data_ptr() for one in held))
        outer = (tensor.data_ptr() for tensor in self._outer)
        pointers = self._array, addresses, *outer, x.data_ptr(), out.data_ptr(), room.data_ptr()
        sizes = count, self.dim, self.token, len(self._blocks), torch.get_num_threads()
        _function()(*pointers, *sizes, x.dtype == torch.bfloat16, NORM_EPS)
        return out


def _is_held(layer: nn.Module) -> bool:
    if not isinstance(layer, QuantizedLinear) or not is_plain(layer) or not isinstance(layer.format, PerRow):
        return False
    weight, scale, square = layer.weight, layer.weight_scale, layer.rows == layer.columns
    kinds = weight.dtype == torch.int8 and scale.dtype == torch.bfloat16 and layer.layout is None
    whole = layer.rows % INT8_ROWS == 0 and layer.columns % INT8_COLUMNS == 0
    return (
        square and kinds and whole and weight.is_contiguous() and scale.is_contiguous() and weight.device.type == "cpu"
    )


def _is_plain_linear(layer: nn.Module) -> bool:
    plain = isinstance(layer, nn.Linear) and is_plain(layer) and layer.bias is not None
    return plain and layer.weight.device.type == "cpu"


def _parts(layer: QuantizedLinear) -> list[Tensor]:
    bias = torch.zeros(layer.rows) if layer.bias is None else layer.bias.detach().float().contiguous()
    return [layer.weight.detach(), layer.weight_scale.detach(), bias]


def missing(device: torch.device) -> str | None:
    """What a device lacks for this step."""
    return compiler.missing_for(SOURCE, device)


@cache
def _function() -> ctypes._NamedFuncPointer:
    found = compiler.loaded(SOURCE).nextstep_velocity
    found.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_int64] * 6 + [ctypes.c_float]
    return found
