"""How a quantized matrix is multiplied: PyTorch's packed products where a device has them, else a plain product.

Candidates stand in the order of preference; a candidate that a device or a version of PyTorch lacks, or that gives
wrong numbers there, is passed over. On CUDA, where their order differs from card to card, the fastest is taken.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import NextStepError
from .formats import Format, Int4, PerRow, Rotated, rotate
from .layouts import RowBlocks, cpu_layout

log = logging.getLogger(__name__)

WEIGHT_ALIGNMENT = 64  # bytes; PyTorch's int8 product for CPUs dies on a matrix that does not start at a multiple of 16
MOST_PACKED_ROWS = 16  # above, turning the weights into floats once costs less than what the packed products lose
TOLERANCE = 0.02
TIMED_CALLS = 20


def aligned(weight: Tensor) -> Tensor:
    """The same layout; a copy where the weight is a view of a file and starts anywhere."""
    return weight if weight.data_ptr() % WEIGHT_ALIGNMENT == 0 else weight.clone()


@dataclass(frozen=True)
class Kernel:
    """run(x, weight, scale): rows x (M, columns) times the matrix, (M, rows), in the dtype of x.

    `pack` brings a format's weight into the layout that `run` reads, on the device where it runs; None where it is the
    format's own. `layout` is that layout, where it is one that files are kept in.
    """

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    pack: Callable[[Tensor], Tensor] | None = None
    layout: RowBlocks | None = None

    def packed(self, weight: Tensor) -> Tensor:
        """A format's weight in the layout of this kernel."""
        return weight if self.pack is None else self.pack(weight)


def _dequantized(format: Format) -> Kernel:
    def run(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, format.dequantize(weight, scale, x.dtype))

    return Kernel("product with dequantized weights", run)


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


def _compiled(format: Format) -> Kernel:
    plain = _dequantized(format)

    def run(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        if len(x) > MOST_PACKED_ROWS:
            return plain.run(x, weight, scale)
        return _compiled_row_sums()(x, weight, scale.to(x.dtype))

    return Kernel("compiled row sums", run)


def _packed_int4(format: Int4, on_cpu: bool) -> Kernel:
    product = torch._weight_int4pack_mm_for_cpu if on_cpu else torch._weight_int4pack_mm
    layout = cpu_layout() if on_cpu else None

    exact = on_cpu and format.scale_dtype == torch.float32

    def run(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        computed = x.dtype if exact else torch.bfloat16
        return product(x.to(computed), weight, format.group, scale.to(computed)).to(x.dtype)

    def pack(weight: Tensor) -> Tensor:
        if layout is not None:
            return layout.pack(weight)
        if on_cpu:
            return torch._convert_weight_to_int4pack_for_cpu(format.values(weight).int(), 1)
        columns = 2 * weight.shape[1]
        tiles = next(tiles for tiles in (8, 4, 2) if columns % (16 * tiles) == 0)
        return torch._convert_weight_to_int4pack(weight, tiles)

    return Kernel("packed int4 product", run, pack, layout)


def candidates(format: Format, device_type: str) -> list[Kernel]:
    """What can multiply a matrix of `format` on a device, best first; the last one works everywhere."""
    if isinstance(format, Rotated):
        return [_of_rotated(kernel, format.rotated) for kernel in candidates(format.inner, device_type)]
    found = []
    if isinstance(format, Int4):
        found.append(_packed_int4(format, device_type == "cpu"))
    if isinstance(format, PerRow) and format.dtype == torch.int8 and device_type != "cuda":
        # its kernel for CUDA reads the weights byte by byte
        found.append(Kernel("packed int8 product", _packed_int8, aligned if device_type == "cpu" else None))
    if isinstance(format, PerRow) and device_type == "cuda":
        found.append(_compiled(format))
    return [*found, _dequantized(format)]


def _of_rotated(kernel: Kernel, group: int) -> Kernel:
    def run(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return kernel.run(rotate(x, group), weight, scale)

    return replace(kernel, name=f"{kernel.name}, inputs rotated", run=run)


def choose(format: Format, columns: int, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Kernel:
    """The kernel for a weight and scale on their device, for few rows of `dtype`.

    NextStepError when not even the plain product, which all others are compared with, is finite.
    """
    x = torch.randn(2, columns).to(weight.device, dtype)
    plain = _dequantized(format).run(x, weight, scale).float()
    if not plain.isfinite().all():
        raise NextStepError(
            "A matrix of the {format} weights gives numbers that {dtype} cannot hold. Download or convert "
            "the file again, or choose another dtype.",
            format=format.name,
            dtype=str(dtype).removeprefix("torch."),
        )
    working: dict[Kernel, float] = {}
    for kernel in candidates(format, weight.device.type):
        try:
            packed = kernel.packed(weight)
            error = (kernel.run(x, packed, scale).float() - plain).norm() / plain.norm().clamp_min(1e-6)
            if not error <= TOLERANCE:
                raise RuntimeError(f"it is off by {error:.1%}")
        except Exception as reason:  # a compiler's or a device's own kinds of failure
            log.info("%s: no %s here (%s)", format.name, kernel.name, str(reason).splitlines()[:1])
            continue
        if weight.device.type != "cuda":
            return kernel
        working[kernel] = _seconds(partial(kernel.run, x, packed, scale), weight.device)
    fastest = min(working, key=working.__getitem__)
    log.info("%s: %s", format.name, ", ".join(f"{k.name} {1e6 * s:.0f} us" for k, s in working.items()))
    return fastest


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    call()
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(TIMED_CALLS):
        call()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / TIMED_CALLS
