"""Products for few rows by what they compute: halves of activations, padding, layouts, other packages' kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nextstep_core import NextStepPipeline
from nextstep_core.runtime.quantization import gemlite, libraries, products, quantized_linears
from nextstep_core.runtime.quantization.formats import FP8, INT4, INT4_32, INT8, Format, Rotated
from nextstep_core.runtime.quantization.kernel import Kernel, by_rows, of_rotated, padded, plain, unpacked
from nextstep_core.runtime.quantization.layouts import Swapped, Tiles
from nextstep_core.runtime.quantization.products import halves, racing, usual

CPU = torch.device("cpu")


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def with_a_massive_one(rows: int, columns: int) -> Tensor:
    """Activations as language models have them: one channel is a hundred times the others."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    x[:, 7] = 100.0
    return x


def stored(format: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and scale, and the matrix that they stand for; its seventh column is small, as beside a massive input."""
    matrix = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    matrix[:, 7] *= 1e-2
    weight, scale = format.quantize(matrix)
    return weight, scale, format.dequantize(weight, scale, torch.float32)


def test_two_halves_hold_what_one_int8_loses() -> None:
    x = torch.tensor([[127.0, 0.3, -0.002], [254.0, -0.7, 1.0]])
    pairs, step = halves(x, 8)
    assert step.tolist() == [[1.0], [2.0]] and pairs.shape == (8, 3) and pairs.dtype == torch.int8
    assert pairs[:4].tolist() == [[127, 0, 0], [127, 0, 0], [0, 76, -1], [0, -89, 127]], "254 * 0.3, 254 * -0.35"
    assert not pairs[4:].any()
    wild = with_a_massive_one(3, 64)
    pairs, step = halves(wild, 6)
    assert ((pairs[:3] + pairs[3:] / 254) * step - wild).abs().max() <= step.max() / 500
    assert halves(torch.zeros(1, 4), 2)[0].abs().max() == 0, "nothing is divided by zero"


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_halves_are_the_product(rows: int, dtype: torch.dtype) -> None:
    """As exact as with floats, also beside a massive activation, where one int8 for each would be off by a fifth."""
    x = with_a_massive_one(rows, 256).to(dtype)
    for format, product in ((INT8, products._int8_halves), (FP8, products._fp8_halves)):
        weight, scale, matrix = stored(format)
        try:
            found = product(x, weight, scale)
        except (RuntimeError, NotImplementedError) as reason:
            pytest.skip(f"not on this CPU: {reason}")
        assert found.dtype == dtype and found.shape == (rows, 64)
        assert relative(found, x.float() @ matrix.T) <= (0.002 if dtype == torch.float32 else 0.005), format.name


def test_one_int8_for_each_activation_is_not_enough() -> None:
    """Why there are two: what is left of the others beside a massive one."""
    x, (weight, scale, matrix) = with_a_massive_one(2, 256), stored(INT8)
    pairs, step = halves(x, 4)
    alone = (pairs[:2].float() @ weight.float().T) * step * scale.float()
    assert relative(alone, x @ matrix.T) > 0.2


def test_compiled_sums_take_as_many_rows_as_were_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def sums(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        seen.append(len(x))
        return products._row_sums(x, weight, scale)

    monkeypatch.setattr(products, "_compiled_row_sums", lambda: sums)
    weight, scale, matrix = stored(INT8)
    for rows in (1, 2, 3, 5, 8, 9, 16):
        x = torch.randn(rows, 256)
        assert relative(products._compiled(x, weight, scale), x @ matrix.T) <= 1e-5
    assert seen == [1, 2, 4, 8, 8, 16, 16], "PyTorch compiles for eight numbers of rows at most"


def test_padding_changes_nothing() -> None:
    weight, scale, matrix = stored(INT8)
    seen: list[int] = []

    def run(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        seen.append(len(x))
        return plain(INT8).run(x, weight, scale)

    kernel = padded(Kernel("x", run), 4, "padded")
    x = torch.randn(2, 256)
    assert relative(kernel.run(x, weight, scale), x @ matrix.T) <= 1e-5 and seen == [4]
    assert kernel.takes(3) and not kernel.takes(4) and kernel.name == "padded"


def test_for_many_rows_the_layout_is_undone() -> None:
    weight, scale, matrix = stored(INT4)
    for layout in (Tiles("tiles", 256), Swapped("swapped", 256, tiled=True)):
        packed = Kernel("packed", lambda *_: pytest.fail("not this one"), layout.pack, layout)
        x = torch.randn(40, 256)
        assert relative(unpacked(packed, INT4, "many").run(x, packed.packed(weight), scale), x @ matrix.T) <= 1e-5


def test_kernels_by_rows() -> None:
    def kernel(number: int, most: int | None = None) -> Kernel:
        return Kernel(str(number), lambda x, weight, scale: torch.full((len(x),), number), most_rows=most)

    two, eight, many = kernel(2), kernel(8), kernel(9)
    chosen = by_rows({2: two, 4: two, 8: eight, 16: many, 32: many}, many)
    counts = {rows: int(chosen.run(torch.empty(rows, 1), torch.empty(0), torch.empty(0))[0]) for rows in
              (1, 2, 3, 4, 5, 8, 9, 33)}  # fmt: skip
    assert counts == {1: 2, 2: 2, 3: 2, 4: 2, 5: 8, 8: 8, 9: 9, 33: 9}
    assert chosen.name == "2 up to 2 rows, 2 up to 4 rows, 8 up to 8 rows, 9"
    assert by_rows({2: many, 32: many}, many) is many, "where it is the same for all"


def test_what_races_where() -> None:
    names = {}
    for format in (INT8, FP8, INT4, INT4_32, Rotated(INT8, 16)):
        weight, _, _ = stored(format)
        names[format.name] = [kernel.name for kernel in racing(format, usual(format, "cpu")[0], weight)]
    all_three = ["padded-to-4", "padded-to-6", "native-rows"]
    assert names == {name: [] if name == "fp8" else all_three for name in names}


def test_kernels_of_one_layout_are_told_to_be() -> None:
    """For they are held once; kernels are made anew for each shape."""
    for format in (INT4, INT8):
        assert usual(format, "cpu")[0].lies == usual(format, "cpu")[0].lies
    assert usual(INT4, "cpu")[0].lies != plain(INT4).lies
    rotated = Rotated(INT4, 64)
    weight = stored(INT4)[0]
    base = usual(rotated, "cpu")[0]
    assert {kernel.lies for kernel in racing(rotated, base, weight)} == {base.lies}


def test_a_rotated_matrix_is_raced_with_rotated_inputs() -> None:
    format = Rotated(INT8, 16)
    weight, scale, matrix = stored(format)
    base = usual(format, "cpu")[0]
    x = torch.randn(2, 256)
    for kernel in racing(format, base, weight):
        if kernel.missing(CPU) is not None:
            continue
        assert relative(kernel.run(x, kernel.packed(weight), scale), x @ matrix.T) <= 0.01
    assert relative(of_rotated(plain(INT8), 16).run(x, weight, scale), x @ matrix.T) <= 1e-5


def test_without_the_package_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "version_of", lambda package: None)
    monkeypatch.setattr(libraries, "_kitchen", lambda: pytest.fail("it was imported"))
    for format in (INT8, INT4):
        (kernel,) = libraries.kitchen(format)
        assert kernel.missing(torch.device("cuda")) == "comfy-kitchen is not installed"
    assert libraries.kitchen(FP8) == [] == libraries.kitchen(Rotated(INT8, 16))


def test_gemlite_is_tried_for_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers: tests/kernels/test_gemlite.py."""
    monkeypatch.setattr(gemlite, "version_of", lambda package: None)
    for format in (INT4, INT8, FP8):
        (kernel,) = gemlite.products(format)
        assert kernel.missing(torch.device("cuda")) == "gemlite is not installed"
        with FakeTensorMode():
            weight = torch.empty(64, 64, dtype=torch.uint8, device="cuda")
            assert "gemlite" in {one.name for one in racing(format, usual(format, "cuda")[0], weight)}
    assert gemlite.products(Rotated(INT8, 16)) == []


@pytest.mark.parametrize("rows", [1, 2, 12])
def test_comfy_kitchens_products_are_the_product(rows: int) -> None:
    """Its own code for CPUs, which stands for its kernels: the same arguments, layouts and rounding."""
    pytest.importorskip("comfy_kitchen", exc_type=ImportError)
    for format, x in ((INT8, with_a_massive_one(rows, 256)), (INT4, torch.randn(rows, 256))):
        weight, scale, matrix = stored(format)
        (kernel,) = libraries.kitchen(format)
        found = kernel.run(x, kernel.packed(weight), kernel.packed_scale(scale))
        assert found.dtype == x.dtype and relative(found, x @ matrix.T) <= 0.01, kernel.name


@pytest.mark.slow
@pytest.mark.parametrize(("format", "product"), [(INT8, "_int8_halves"), (FP8, "_fp8_halves")], ids=["int8", "fp8"])
def test_pictures_by_halves_are_those_of_the_plain_product(format: Format, product: str) -> None:
    """Forced on, in all of the embedded model: what they change is far less than what the format itself does."""
    pictures = {}
    for name in ("float", "plain", "halves"):
        recipe = None if name == "float" else format.name
        pipe = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32, quantization=recipe)
        kernel = Kernel("halves", getattr(products, product)) if name == "halves" else plain(format)
        for _, layer in quantized_linears(pipe.engine.model):
            layer.kernel = kernel  # the weights of both formats lie on a CPU as they are stored
        pictures[name] = pipe.generate("a red circle on a blue background", height=64, width=64, steps=4, seed=5).images
    of_format = (pictures["plain"] - pictures["float"]).abs().mean()
    assert (pictures["halves"] - pictures["plain"]).abs().mean() <= of_format / 5
