"""PyTorch's own products with quantized matrices, and what stands for them where a device or a version has none."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..native import rows as native
from ..triton import support
from . import gemlite
from .formats import FP8, INT4, INT8, Format, Int4, PerRow, Rotated, row_steps
from .kernel import Kernel, of_rotated, padded, plain, unpacked
from .layouts import Layout, RowBlocks, Swapped, Tiles, cpu_layout, inner_tiles
from .libraries import kitchen

WEIGHT_ALIGNMENT = 64  # bytes; PyTorch's int8 product for CPUs dies on a matrix that does not start at a multiple of 16
MOST_ROWS_IN_C = 256  # of int8; above, as when a long prompt is read, floats made once are multiplied as fast
MOST_PACKED_ROWS = 16  # above, turning the weights into floats once costs less than what the packed products lose
LEAST_INT_ROWS, FEWEST_FLOAT_ROWS = 32, 16  # that the products of integers and of 8-bit floats take at once on CUDA
OWN = "triton-rows"
FINER = 254, 16  # what the second halves are multiplied by, of integers and of 8-bit floats


def aligned(weight: Tensor) -> Tensor:
    """The same layout; a copy where the weight is a view of a file and starts anywhere."""
    return weight if weight.data_ptr() % WEIGHT_ALIGNMENT == 0 else weight.clone()


def _packed_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    rounded = x.bfloat16().contiguous()  # the packed product is fast in bfloat16 only; it adds up in float32
    if len(x) > MOST_PACKED_ROWS:
        return F.linear(rounded, weight.to(rounded.dtype) * scale.to(rounded.dtype)[:, None]).to(x.dtype)
    return torch._weight_int8pack_mm(rounded, weight, scale.bfloat16()).to(x.dtype)


def _row_sums(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """A product for few rows that a compiler makes into one pass over the weights."""
    return torch.stack([(weight.to(x.dtype) * row).sum(dim=1, dtype=torch.float32) for row in x]).to(x.dtype) * scale


@cache
def _compiled_row_sums() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    # Symbolic sizes: one compilation serves the matrices of all shapes; PyTorch gives up after a handful of them.
    return torch.compile(_row_sums, dynamic=True)


def _compiled(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    # Each number of rows is a compilation, of which there may be few: as many as are tried.
    rows = 1 << (len(x) - 1).bit_length()
    wide = x if rows == len(x) else F.pad(x, (0, 0, 0, rows - len(x)))
    return _compiled_row_sums()(wide, weight, scale.to(x.dtype))[: len(x)]


def _without_triton(device: torch.device) -> str | None:
    return "Triton is not installed" if importlib.util.find_spec("triton") is None else None


def halves(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """x (M, columns) as two rows of int8 for each of its own, (at least `rows`, columns), and the step of each (M, 1).

    x is step * (first + second / 254), to within a 500th of a step: what activations of one int8 would lose, above all
    beside a large one, is in the second. A product that reads its weights once for all rows has them at no cost.
    """
    x = x.float()
    step = row_steps(x, INT8.top)
    scaled = x / step
    first = scaled.round()
    out = torch.zeros(max(rows, 2 * len(x)), x.shape[1], dtype=torch.int8, device=x.device)
    out[: len(x)] = first
    out[len(x) : 2 * len(x)] = ((scaled - first) * FINER[0]).round_()
    return out, step


def _int8_halves(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    pairs, step = halves(x, LEAST_INT_ROWS)
    sums = torch._int_mm(pairs, weight.t())[: 2 * len(x)]
    first, second = sums.chunk(2)
    out: Tensor = (first + second / FINER[0]) * step * scale
    return out.to(x.dtype)


def _fp8_halves(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The same with 8-bit floats: two of them hold what bfloat16 does."""
    wide = x.float()
    step = row_steps(wide, FP8.top)
    scaled = wide / step
    first = scaled.to(weight.dtype)
    second = ((scaled - first.float()) * FINER[1]).to(weight.dtype)
    rows = -(-2 * len(x) // FEWEST_FLOAT_ROWS) * FEWEST_FLOAT_ROWS
    pairs = torch.zeros(rows, x.shape[1], dtype=torch.uint8, device=x.device)
    pairs[: len(x)], pairs[len(x) : 2 * len(x)] = first.view(torch.uint8), second.view(torch.uint8)
    one = torch.ones((), device=x.device)
    sums: Tensor = torch._scaled_mm(pairs.view(weight.dtype), weight.t(), one, one, out_dtype=torch.float32)[
        : 2 * len(x)
    ]
    first_sums, second_sums = sums.chunk(2)
    out: Tensor = (first_sums + second_sums / FINER[1]) * step * scale
    return out.to(x.dtype)


def _capability(least: tuple[int, int], what: str) -> Callable[[torch.device], str | None]:
    def missing(device: torch.device) -> str | None:
        if device.type != "cuda" or torch.version.hip is not None:
            return "for NVIDIA cards"
        return None if torch.cuda.get_device_capability(device) >= least else f"the card has no {what}"

    return missing


def _pack_for_cpu(weight: Tensor) -> Tensor:
    layout = cpu_layout()
    if layout is not None:
        return layout.pack(weight)
    return torch._convert_weight_to_int4pack_for_cpu(INT4.values(weight).int(), 1)


def _pack_for_gpu(weight: Tensor) -> Tensor:
    return torch._convert_weight_to_int4pack(weight, inner_tiles(2 * weight.shape[1]))


def _packed_int4(format: Int4, device_type: str) -> Kernel:
    on_cpu = device_type == "cpu"
    exact = on_cpu and format.scale_dtype == torch.float32

    def run(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        product = torch._weight_int4pack_mm_for_cpu if on_cpu else torch._weight_int4pack_mm
        computed = x.dtype if exact else torch.bfloat16
        return product(x.to(computed), weight, format.group, scale.to(computed)).to(x.dtype)

    return Kernel("torch-int4", run, _pack_for_cpu if on_cpu else _pack_for_gpu, cpu_layout() if on_cpu else None)


def _with_layout(kernel: Kernel, weight: Tensor) -> Kernel:
    """A GPU's packed product with the layout that it packs `weight` in, where that is one that we know."""
    columns = 2 * weight.shape[1]
    known: tuple[Layout, ...] = (Tiles("tiles", columns), Swapped("swapped", columns, tiled=True))
    try:
        packed = kernel.packed(weight)
        found = next((layout for layout in known if torch.equal(layout.unpack(packed), weight)), None)
    except RuntimeError:
        return kernel
    return replace(kernel, layout=found)


def own(format: Format) -> list[Kernel]:
    """Our own kernel, which reads the weights once for all rows, as the format lays them out."""

    def run(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        from ..triton.rows import Matrix, product

        matrix = Matrix.of(format, weight, scale)
        if matrix is None:
            raise ValueError(f"no kernel for {format.name}")
        return product(x, matrix)

    version = f"{torch.__version__} {support.VERSION}"
    return [Kernel(OWN, run, most_rows=support.MOST_ROWS, version=version, missing=support.missing)]


def in_c(format: Format, base: Kernel, weight: Tensor) -> list[Kernel]:
    """Our own product for CPUs with what `base`, PyTorch's packed one, reads; none where it is for no such matrix."""
    rows, columns = len(weight), weight.shape[1]
    version = native.VERSION
    if isinstance(format, Int4) and isinstance(base.layout, RowBlocks) and format.scale_dtype == torch.bfloat16:
        whole, group = rows % base.layout.rows == 0 and not base.layout.neighbours, format.group
        version += f" {base.layout.name}"  # PyTorch may be told to compute in another one, which C would read wrongly

        def run(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
            return native.library().int4(x, weight, scale, group)
    elif isinstance(format, PerRow) and format.dtype == torch.int8 and format.scale_dtype == torch.bfloat16:
        whole = rows % native.INT8_ROWS == 0 and columns % native.INT8_COLUMNS == 0

        def run(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
            many = len(x) > MOST_ROWS_IN_C
            return base.run(x, weight, scale) if many else native.library().int8(x, weight, scale)
    else:
        return []
    own = replace(base, name="native-rows", run=run, version=version, missing=native.missing, most_rows=None)
    return [own] if whole else []


def usual(format: Format, device_type: str) -> list[Kernel]:
    """What multiplies a matrix of `format` where nothing is measured, best first; the last works everywhere."""
    if isinstance(format, Rotated):
        return [of_rotated(kernel, format.rotated) for kernel in usual(format.inner, device_type)]
    found = []
    if isinstance(format, Int4) and device_type != "cuda":
        found.append(_packed_int4(format, device_type))
    if isinstance(format, PerRow) and format.dtype == torch.int8 and device_type != "cuda":
        found.append(Kernel("torch-int8", _packed_int8, aligned if device_type == "cpu" else None))
    return [*found, plain(format)]


def racing(format: Format, base: Kernel, weight: Tensor) -> list[Kernel]:
    """What may be faster than `base`, one of the usual ones, on the device of a weight; the preferred first."""
    if isinstance(format, Rotated):
        # The rotation is the same for all of them, and the matrix is one of the inner format.
        inner = next((one for one in usual(format.inner, weight.device.type) if one.name == base.name), base)
        return [of_rotated(kernel, format.rotated) for kernel in racing(format.inner, inner, weight)]
    kind = weight.device.type
    if kind == "cpu":
        paddings = [padded(base, rows, f"padded-to-{rows}") for rows in (4, 6)] if base.pack is not None else []
        return [*paddings, *in_c(format, base, weight)]
    found: list[Kernel] = []
    if isinstance(format, Int4):
        packed = base if base.name == "torch-int4" else _packed_int4(format, kind)
        packed = _with_layout(packed, weight)
        found = [packed] if packed.lies != base.lies else []
        if packed.layout is not None:
            found.append(unpacked(packed, format, "torch-int4-unpacked"))
        found += [*kitchen(format), *gemlite.products(format), *own(format)] if kind == "cuda" else []
    elif isinstance(format, PerRow) and kind == "cuda":
        found.append(Kernel("torch-compiled", _compiled, most_rows=MOST_PACKED_ROWS, missing=_without_triton))
        if format.dtype == torch.int8:
            integers = _capability((7, 5), "product of int8")
            found.append(Kernel("torch-int8-halves", _int8_halves, missing=integers))
            found += kitchen(format)
        else:
            floats = _capability((8, 9), "product of fp8")
            found.append(Kernel("torch-fp8-halves", _fp8_halves, missing=floats))
        found += [*gemlite.products(format), *own(format)]
    return found
