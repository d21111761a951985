"""A product of a few rows with an int8 or int4 matrix on a CPU, by `rows.c`: the weights are read once for two rows.

Between rows of floats and a matrix of integers stand integers alone, as processors multiply them fastest. Each row is
rounded to int8 twice, the second time what the first left, so that it loses no more than a 500th of an int8's step.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from . import compiler

_Function: TypeAlias = "ctypes._NamedFuncPointer"

SOURCE = Path(__file__).with_name("rows.c")
VERSION = compiler.version_of(SOURCE)
INT8_COLUMNS, INT8_ROWS = 64, 4  # of which an int8 matrix has whole numbers
AT_ONCE = 32  # rows: no slower than all at once, and a long prompt takes a few MB beside the result, not hundreds


class Library:
    """What `rows.c` offers, with tensors for its pointers."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._int4, self._int8 = loaded.nextstep_int4, loaded.nextstep_int8
        self._int4.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 6
        self._int8.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 5
        self.block: int = ctypes.c_int64.in_dll(loaded, "nextstep_block").value

    def int4(self, x: Tensor, weight: Tensor, scale: Tensor, group: int) -> Tensor:
        """x (M, columns) times an int4 matrix, (M, rows) in the dtype of x.

        weight (rows, columns / 2) uint8 lies in blocks of `block` rows (`RowBlocks`), scale (groups, rows, 2) is
        bfloat16.
        """
        rows, columns = len(weight), x.shape[1]
        whole = rows % self.block == 0 and columns % group == 0 and group % 4 == 0
        shapes = weight.shape == (rows, columns // 2) and scale.shape == (columns // group, rows, 2)
        _check(x.is_cpu and whole and shapes and weight.dtype == torch.uint8, weight, scale)
        return self._product(self._int4, x, weight, scale, 12 * columns // group, group)

    def int8(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """x (M, columns) times an int8 matrix (rows, columns) with a bfloat16 scale for each row, (M, rows)."""
        rows, columns = len(weight), x.shape[1]
        whole = rows % INT8_ROWS == 0 and columns % INT8_COLUMNS == 0
        shapes = weight.shape == (rows, columns) and scale.shape == (rows,)
        _check(x.is_cpu and whole and shapes and weight.dtype == torch.int8, weight, scale)
        return self._product(self._int8, x, weight, scale, 12)

    def _product(self, function: _Function, x: Tensor, weight: Tensor, scale: Tensor, sums: int, *more: int) -> Tensor:
        (count, columns), rows = x.shape, len(weight)
        inputs = x.contiguous() if x.dtype in (torch.float32, torch.bfloat16) else x.float().contiguous()
        out = torch.empty(count, rows, dtype=inputs.dtype)
        room = torch.empty(min(count, AT_ONCE) * (6 * columns + 4 * rows + sums) + 64, dtype=torch.uint8)
        sizes = rows, columns, torch.get_num_threads(), inputs.dtype == torch.bfloat16
        whole = [(inputs, out)]  # a split costs as much as a small product
        for some, results in whole if count <= AT_ONCE else zip(inputs.split(AT_ONCE), out.split(AT_ONCE)):
            pointers = (tensor.data_ptr() for tensor in (weight, scale, some, results, room))
            function(*pointers, len(some), *sizes, *more)
        return out.to(x.dtype)


def _check(fits: bool, weight: Tensor, scale: Tensor) -> None:
    """C reads what it is told to read, so nothing but what it was written for gets there."""
    lies = weight.is_cpu and scale.is_cpu and weight.is_contiguous() and scale.is_contiguous()
    if not (fits and lies and scale.dtype == torch.bfloat16):
        raise ValueError(f"no product in C for a matrix {tuple(weight.shape)} {weight.dtype}, {scale.dtype}")


def missing(device: torch.device) -> str | None:
    """What a device lacks for these products."""
    return compiler.missing_for(SOURCE, device)


@cache
def library() -> Library:
    """The library for this processor, compiled at the first call; RuntimeError where that fails."""
    return Library(compiler.loaded(SOURCE))
