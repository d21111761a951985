"""The layouts of int4 matrices for CPUs: by hand, there and back, and the one of this machine."""

from __future__ import annotations

import pytest
import torch

from nextstep_core import NextStepError
from nextstep_core.runtime.quantization.formats import INT4
from nextstep_core.runtime.quantization.layouts import (
    LAYOUTS,
    PROBE,
    RowBlocks,
    Swapped,
    Tiles,
    cpu_layout,
    find_layout,
)


def test_two_rows_share_a_byte_column_after_column() -> None:
    """Rows 1 2 3 4 / 5 6 7 8 / 9 10 11 12 / 13 14 15 0, in blocks of four."""
    weight = torch.tensor([[0x12, 0x34], [0x56, 0x78], [0x9A, 0xBC], [0xDE, 0xF0]], dtype=torch.uint8)
    apart = torch.tensor([[0x91, 0xD5], [0xA2, 0xE6], [0xB3, 0xF7], [0xC4, 0x08]], dtype=torch.uint8)
    neighbours = torch.tensor([[0x51, 0xD9], [0x62, 0xEA], [0x73, 0xFB], [0x84, 0x0C]], dtype=torch.uint8)
    assert torch.equal(RowBlocks("x", 4).pack(weight), apart)
    assert torch.equal(RowBlocks("x", 4, neighbours=True).pack(weight), neighbours)
    assert torch.equal(RowBlocks("x", 64).pack(weight), neighbours), "what is no whole block"


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("rows", [16, 64, 176, 640])
def test_there_and_back(name: str, rows: int) -> None:
    weight = torch.randint(256, (rows, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(rows))
    layout = find_layout(name)
    kept = weight.clone()
    assert torch.equal(layout.unpack(layout.pack(weight)), weight)
    assert torch.equal(weight, kept), "what is given stays as it is"
    assert torch.equal(layout.unpack(layout.pack(weight.t().contiguous().t())), weight)


def test_this_machines_layout_is_that_of_pytorch() -> None:
    layout = cpu_layout()
    if layout is None:
        pytest.skip("PyTorch packs int4 in a way of its own here")
    weight = torch.randint(256, (208, 640), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layout.pack(weight), torch._convert_weight_to_int4pack_for_cpu(INT4.values(weight).int(), 1))
    assert sum(torch.equal(layout.pack(weight), other.pack(weight)) for other in LAYOUTS.values()) == 1


def test_a_layout_of_another_name_is_refused() -> None:
    with pytest.raises(NextStepError, match="cpu-128"):
        find_layout("cpu-128")


def test_a_files_layout_stays_what_its_name_says() -> None:
    """Kept files name the layout that they lie in; the matrix that PyTorch is asked with tells all of them apart."""
    meant = {"cpu-64": (64, False), "cpu-32": (32, False), "cpu-32-pairs": (32, True)}
    assert {name: (layout.rows, layout.neighbours) for name, layout in LAYOUTS.items()} == meant
    shape, generator = (PROBE[0], PROBE[1] // 2), torch.Generator().manual_seed(0)
    weight = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    assert len({layout.pack(weight).numpy().tobytes() for layout in LAYOUTS.values()}) == len(LAYOUTS)


def tensor_core_lanes(weight: torch.Tensor, inner: int) -> torch.Tensor:
    """What each lane of a warp takes, value by value, for the B operand of m16n8k16 in int4.

    Lane t holds row t // 4 and, of each 8 bytes, byte t % 4 and the fourth after it; eight values of two such stretches
    make an int32, the even columns' in its low half.
    """
    rows, width = weight.shape
    out = torch.zeros(rows // 8, 2 * width // (16 * inner), 32, inner // 2, dtype=torch.int64)
    for tile, outer, lane, pair in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        start = (outer * inner + 2 * pair) * 8 + lane % 4
        bytes_ = [int(weight[tile * 8 + lane // 4, start + 4 * n]) for n in range(4)]
        values = [byte >> 4 for byte in bytes_] + [byte & 15 for byte in bytes_]
        out[tile, outer, lane, pair] = sum(value << 4 * n for n, value in enumerate(values))
    return torch.where(out >= 1 << 31, out - (1 << 32), out).int()


@pytest.mark.parametrize(("columns", "inner"), [(32, 2), (64, 4), (96, 2), (128, 8), (384, 8)])
def test_tensor_cores_lanes(columns: int, inner: int) -> None:
    weight = torch.randint(256, (16, columns // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    layout = Tiles("x", columns)
    assert layout.inner == inner
    packed = layout.pack(weight)
    assert torch.equal(packed, tensor_core_lanes(weight, inner))
    assert torch.equal(layout.unpack(packed), weight)


def test_swapped_halves() -> None:
    weight = torch.tensor([[0x12, 0x34]], dtype=torch.uint8)
    assert Swapped("x", 4, tiled=False).pack(weight).tolist() == [[0x21, 0x43]]
    many = torch.randint(256, (16, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for layout in (Swapped("x", 128, tiled=False), Swapped("x", 128, tiled=True)):
        assert torch.equal(layout.unpack(layout.pack(many)), many)
    assert Swapped("x", 128, tiled=True).pack(many).shape == (2, 1, 32, 4), "as the product asks for"
