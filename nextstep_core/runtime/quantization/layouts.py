"""How PyTorch's int4 product for CPUs wants a matrix to lie, known well enough to go there and back.

The product reads blocks of rows, whose size hangs on the CPU's vector units. Which layout this machine computes in is
found by comparing with PyTorch's own packing. So a file can keep weights in it, and another machine can undo it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ...errors import check_choice
from .formats import INT4

PROBE = 176, 64  # rows and columns of a matrix that tells all layouts apart: whole blocks of each, and a rest


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
