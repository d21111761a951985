"""How products want int4 matrices to lie, known well enough to go there and back.

PyTorch's product for CPUs reads blocks of rows, whose size hangs on the CPU's vector units. Which layout this machine
computes in is found by comparing with PyTorch's own packing. So a file can keep weights in it, and another machine can
undo it. What GPUs want is undone for many rows, where floats are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from ...errors import check_choice
from .formats import INT4

PROBE = 176, 64  # rows and columns of a matrix that tells all layouts apart: whole blocks of each, and a rest


class Layout(Protocol):
    """Where in memory the values of an int4 matrix lie."""

    @property
    def name(self) -> str:
        """What files and messages call it."""

    def pack(self, weight: Tensor) -> Tensor:
        """A weight that lies as int4 formats say, in this layout."""

    def unpack(self, weight: Tensor) -> Tensor:
        """A weight that lies in this layout, as int4 formats say."""


@dataclass(frozen=True)
class Swapped:
    """Rows and columns as they are, the even column's value in a byte's low half; `columns` of the matrix.

    PyTorch's product for Apple GPUs has it in the shape that its product for CUDA wants, comfy-kitchen's in rows.
    """

    name: str
    columns: int
    tiled: bool

    def pack(self, weight: Tensor) -> Tensor:
        """See `Layout`."""
        swapped = weight << 4 | weight >> 4
        if not self.tiled:
            return swapped
        tiles = inner_tiles(self.columns)
        return swapped.view(torch.int32).view(len(weight) // 8, -1, 32, tiles // 2)

    def unpack(self, weight: Tensor) -> Tensor:
        """See `Layout`."""
        rows = weight.contiguous().view(torch.uint8).view(-1, self.columns // 2)
        return rows << 4 | rows >> 4


@dataclass(frozen=True)
class Tiles:
    """As NVIDIA's tensor cores read: tiles of 8 rows and `inner` times 16 columns, a lane's eight values in an int32.

    A lane has one row of the tile and every fourth byte of its columns; of four such bytes the even columns' values
    come first.
    """

    name: str
    columns: int

    @property
    def inner(self) -> int:
        """How many times 16 columns a tile has."""
        return inner_tiles(self.columns)

    def pack(self, weight: Tensor) -> Tensor:
        """See `Layout`."""
        # rows of tiles, rows, columns of tiles, int32s, halves of an int32's bytes, bytes of those, their lane
        own = weight.contiguous().view(len(weight) // 8, 8, -1, self.inner // 2, 2, 2, 4)
        first, second = own.unbind(5)  # in the low and in the high half of a byte
        even, odd = second & 0xF0 | first >> 4, second << 4 | first & 15
        lanes = torch.stack([even, odd], dim=4)  # ..., int32s, even or odd, byte, lane
        packed = lanes.permute(0, 2, 1, 6, 3, 4, 5).reshape(-1, 4)
        return packed.view(torch.int32).view(len(weight) // 8, -1, 32, self.inner // 2)

    def unpack(self, weight: Tensor) -> Tensor:
        """See `Layout`."""
        lanes = weight.contiguous().view(torch.uint8).view(len(weight), -1, 8, 4, self.inner // 2, 2, 2)
        even, odd = lanes.unbind(5)
        first, second = even << 4 | odd & 15, even & 0xF0 | odd >> 4
        own = torch.stack([first, second], dim=6)  # ..., rows, lane, int32s, byte, half
        return own.permute(0, 2, 1, 4, 5, 6, 3).reshape(len(weight) * 8, -1)


def inner_tiles(columns: int) -> int:
    """Of the numbers of 16 columns that PyTorch packs together, the greatest that divides a matrix."""
    return next((tiles for tiles in (8, 4, 2) if columns % (16 * tiles) == 0), 2)


@dataclass(frozen=True)
class RowBlocks:
    """int4 in blocks of `rows` rows, column after column; a byte holds two rows' values, the first in its low half.

    The two rows are half a block apart or, where `neighbours`, next to each other; below the last whole block they are
    that in any case. A weight keeps its shape (rows, columns / 2).
    """

    name: str
    rows: int
    neighbours: bool = False

    def pack(self, weight: Tensor) -> Tensor:
        """A weight that lies as int4 formats say, in this layout."""
        out = torch.empty_like(weight, memory_format=torch.contiguous_format)
        for rows, packed in self._parts(weight.contiguous(), out):
            low, high = rows.permute(1, 0, 3, 2).contiguous()
            torch.bitwise_or(low >> 4, high & 0xF0, out=packed[:, :, 0])
            torch.bitwise_or(low & 15, high << 4, out=packed[:, :, 1])
        return out

    def unpack(self, weight: Tensor) -> Tensor:
        """A weight that lies in this layout, as int4 formats say."""
        out = torch.empty_like(weight, memory_format=torch.contiguous_format)
        for rows, packed in self._parts(out, weight.contiguous()):
            even, odd = packed.unbind(2)
            rows[:, 0] = (even << 4 | odd & 15).transpose(1, 2)
            rows[:, 1] = (even & 0xF0 | odd >> 4).transpose(1, 2)
        return out

    def _parts(self, own: Tensor, packed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the whole blocks, and of what is left: (blocks, 2, rows / 2, columns / 2) of the rows, the second
        axis being a byte's halves, and (blocks, columns / 2, 2, rows / 2) of what is packed, the third being even and
        odd columns."""
        whole, bytes_wide = len(own) // self.rows * self.rows, own.shape[1]
        for part, rows, neighbours in (
            (slice(whole), self.rows, self.neighbours),
            (slice(whole, None), len(own) - whole, True),
        ):
            if not len(own[part]):
                continue
            half = rows // 2
            split = (half, 2) if neighbours else (2, half)
            views = own[part].view(-1, *split, bytes_wide)
            yield views.transpose(1, 2) if neighbours else views, packed[part].view(-1, bytes_wide, 2, half)


LAYOUTS = {
    layout.name: layout
    for layout in (
        RowBlocks("cpu-64", 64),  # AVX-512
        RowBlocks("cpu-32", 32),  # AVX2
        RowBlocks("cpu-32-pairs", 32, neighbours=True),  # neither
    )
}


def find_layout(name: str) -> RowBlocks:
    """The layout called `name`; NextStepError when there is none."""
    check_choice("layout", name, LAYOUTS)
    return LAYOUTS[name]


@cache
def cpu_layout() -> RowBlocks | None:
    """The layout that this machine's CPU computes in; None where PyTorch has no such product or another layout."""
    rows, columns = PROBE
    weight = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        packed = torch._convert_weight_to_int4pack_for_cpu(INT4.values(weight).int(), 1)
    except Exception:  # a version's or a platform's own kind of failure
        return None
    return next((layout for layout in LAYOUTS.values() if torch.equal(layout.pack(weight), packed)), None)
