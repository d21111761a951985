"""The layouts of int4 matrices for CPUs: by hand, there and back, and the one of this machine."""

from __future__ import annotations

import pytest
import torch

from nextstep_core import NextStepError
from nextstep_core.runtime.quantization.formats import INT4
from nextstep_core.runtime.quantization.layouts import LAYOUTS, PROBE, RowBlocks, cpu_layout, find_layout


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
