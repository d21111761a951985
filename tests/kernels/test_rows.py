"""Few rows times a matrix of every format, against the plain math, over shapes, rows and places in memory at random."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextstep_core.runtime.quantization.formats import FP8, INT4, INT4_32, INT4_128, INT8, Format, Int4, PerRow
from nextstep_core.runtime.quantization.products import own
from nextstep_core.runtime.triton.rows import FP8 as FP8_CODE
from nextstep_core.runtime.triton.rows import Matrix, product

FORMATS: dict[str, Format | None] = {
    "floats": None,
    **{format.name: format for format in (INT8, FP8, INT4, INT4_32, INT4_128)},
    "int8 of a file": PerRow("int8", torch.int8, 127.0, torch.float32),
    "int4 of a file": Int4("int4", 64, torch.float32),
}
ROUNDING = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def off_by(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-9))


def stored(format: Format | None, matrix: Tensor, dtype: torch.dtype) -> tuple[Matrix, Tensor]:
    """A matrix as the kernel takes it, and the numbers that it stands for."""
    weight, scale = (matrix.to(dtype), None) if format is None else format.quantize(matrix)
    meant = weight.double() if format is None else format.dequantize(weight, scale, torch.float64)
    found = Matrix.of(format, weight, scale)
    assert found is not None
    return found, meant


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FORMATS)
def test_any_shape(name: str, seed: int) -> None:
    draw, generator = random.Random(f"{name} {seed}"), torch.Generator().manual_seed(seed)
    format = FORMATS[name]
    group = getattr(format, "group", 1)
    count = draw.choice([1, 2, 3, 4, 5, 8, 16])
    # Triton's interpreter multiplies matrices of bfloat16 by their bits.
    dtype = draw.choice([torch.float32, torch.float16, *([torch.bfloat16] if count < 5 else [])])
    rows, columns = draw.randint(1, 90), group * draw.randint(1, 400 // group)
    matrix, meant = stored(format, torch.randn(rows, columns, generator=generator) / 8, dtype)
    whole = torch.randn(count * columns + 3, generator=generator).to(dtype)
    start = draw.randint(0, 3)  # anywhere in memory
    x = whole[start : start + count * columns].view(count, columns)
    bias = torch.randn(rows, generator=generator).to(dtype) if draw.random() < 0.5 else None
    plus = torch.randn(count, rows, generator=generator).to(dtype) if draw.random() < 0.5 else None
    gain = torch.rand(columns, generator=generator).to(dtype) if draw.random() < 0.5 else None
    expected = x.double() if gain is None else F.rms_norm(x.double(), (columns,), gain.double(), 1e-6)
    expected = F.linear(expected, meant, None if bias is None else bias.double())
    if plus is not None:
        expected = expected + plus
    ours = product(x, matrix, bias, norm=gain, eps=1e-6, plus=plus)
    assert ours.dtype == dtype
    assert off_by(ours, expected) <= ROUNDING[dtype], (count, rows, columns, dtype)


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("name", ["floats", "int8", "int4"])
def test_gate_and_up_in_one(name: str, count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix, meant = stored(FORMATS[name], torch.randn(2 * 37, 128, generator=generator) / 8, torch.float32)
    x, bias, gain = (torch.randn(*size, generator=generator) for size in ((count, 128), (74,), (128,)))
    normed = F.rms_norm(x.double(), (128,), gain.double(), 1e-6)
    gate, up = F.linear(normed, meant, bias.double()).chunk(2, dim=-1)
    assert off_by(product(x, matrix, bias, norm=gain, eps=1e-6, gated=True), F.silu(gate) * up) <= 1e-5


def test_every_number_of_fp8() -> None:
    """The kernel reads 8-bit floats by their bits: all 256, NaN and those below the smallest normal one among them."""
    weight = torch.arange(256, dtype=torch.uint8)[:, None].view(torch.float8_e4m3fn)
    matrix = Matrix.of(FP8, weight, torch.ones(256))
    assert matrix is not None and matrix.code == FP8_CODE
    ours = product(torch.ones(1, 1), matrix)[0]
    torch.testing.assert_close(ours, weight[:, 0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(bad: float, count: int) -> None:
    generator = torch.Generator().manual_seed(2)
    matrix, meant = stored(INT8, torch.randn(40, 64, generator=generator), torch.float32)
    x = torch.randn(count, 64, generator=generator)
    x[1, 5] = bad
    ours, expected = product(x, matrix), F.linear(x.double(), meant)
    others = [row for row in range(count) if row != 1]
    assert off_by(ours[others], expected[others]) <= 1e-5
    assert not ours[1].isfinite().any()
    torch.testing.assert_close(ours[1].isnan(), expected[1].isnan())


@pytest.mark.parametrize("format", [INT8, FP8, INT4, INT4_32, INT4_128], ids=lambda format: format.name)
def test_as_a_candidate(format: Format) -> None:
    """What the chooser is offered multiplies by what the format stores, as it stores it."""
    generator = torch.Generator().manual_seed(3)
    weight, scale = format.quantize(torch.randn(48, 128, generator=generator))
    (kernel,) = own(format)
    assert kernel.takes(16) and not kernel.takes(17)
    assert kernel.lies == (None, None)
    x = torch.randn(2, 128, generator=generator)
    assert off_by(kernel.run(x, weight, scale), F.linear(x, format.dequantize(weight, scale, x.dtype))) <= 1e-5
