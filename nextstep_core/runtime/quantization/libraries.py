"""comfy-kitchen's products, where it is installed: imported where they are used, and tried like all others.

It comes with newer ComfyUIs and needs no compiler. Its layouts for 4 and 6 bits (`AsymW4A8Int8Layout`) are formats of
their own, with other numbers than a matrix of ours has, so they are no products for it.
"""

from __future__ import annotations

import importlib.metadata
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..devices import current
from .formats import INT8, Format, Int4, PerRow, row_steps
from .kernel import OWN_VERSION, Kernel
from .layouts import Swapped

KITCHEN = "comfy-kitchen"
ROWS_FOR_TENSOR_CORES = 9  # below, its product of int4 has one thread for an output


@cache
def version_of(package: str) -> str | None:
    """The installed version of a package, without importing it; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def kitchen(format: Format) -> list[Kernel]:
    """comfy-kitchen's products for CUDA that compute what a matrix of `format` says."""
    version = f"{version_of(KITCHEN)} {OWN_VERSION}"

    def missing(device: torch.device) -> str | None:
        if version_of(KITCHEN) is None:
            return f"{KITCHEN} is not installed"
        if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
            return f"{KITCHEN} has it for NVIDIA cards from 2020 on"
        return None

    if isinstance(format, PerRow) and format.dtype == torch.int8:
        return [Kernel("kitchen-int8-halves", int8_halves, version=version, missing=missing)]
    if isinstance(format, Int4) and format.scale_dtype == torch.bfloat16:

        def pack(weight: Tensor) -> Tensor:
            return Swapped("swapped", 2 * weight.shape[1], tiled=False).pack(weight)

        def run(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
            return int4(x, weight, scale, format.group)

        return [Kernel("kitchen-int4", run, pack, None, _apart, version=version, missing=missing)]
    return []


def _apart(scale: Tensor) -> Tensor:
    """Scales, then zeros, (2, groups, rows)."""
    return scale.permute(2, 0, 1).contiguous()


def int8_halves(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Its int8 product, of two rows to each of x: it rounds rows to int8 itself, and the second is what that loses."""
    x32 = x.float()
    step = row_steps(x32, INT8.top)
    first = (x32 / step).round() * step
    both = torch.cat([first, x32 - first])
    with current(x.device):
        out: Tensor = _kitchen().int8_linear(both, weight, scale.float(), out_dtype=torch.float32)
    return (out[: len(x)] + out[len(x) :]).to(x.dtype)


def int4(x: Tensor, weight: Tensor, scale: Tensor, group: int) -> Tensor:
    """Its int4 product, with as many rows as it has tensor cores for."""
    rows = F.pad(x.to(scale.dtype), (0, 0, 0, max(0, ROWS_FOR_TENSOR_CORES - len(x))))
    with current(x.device):
        out: Tensor = _kitchen().gemv_awq_w4a16(rows, weight.view(torch.int8), *scale.unbind(0), group_size=group)
    return out[: len(x)].to(x.dtype)


def _kitchen() -> Any:
    import comfy_kitchen

    return comfy_kitchen
