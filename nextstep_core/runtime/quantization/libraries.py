"""Products of packages that are there or not: each is imported where it is used, and tried like all others.

comfy-kitchen comes with newer ComfyUIs and needs no compiler. Its layouts for 4 and 6 bits (`AsymW4A8Int8Layout`) are
formats of their own, with other numbers than a matrix of ours has, so they are no products for it. gemlite, written in
Triton, is for those who install it.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import INT8, Format, Int4, PerRow, row_steps
from .kernel import OWN_VERSION, Kernel
from .layouts import Swapped

KITCHEN, GEMLITE = "comfy-kitchen", "gemlite"
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
    out: Tensor = _kitchen().int8_linear(both, weight, scale.float(), out_dtype=torch.float32)
    return (out[: len(x)] + out[len(x) :]).to(x.dtype)


def int4(x: Tensor, weight: Tensor, scale: Tensor, group: int) -> Tensor:
    """Its int4 product, with as many rows as it has tensor cores for."""
    rows = F.pad(x.to(scale.dtype), (0, 0, 0, max(0, ROWS_FOR_TENSOR_CORES - len(x))))
    out: Tensor = _kitchen().gemv_awq_w4a16(rows, weight.view(torch.int8), *scale.unbind(0), group_size=group)
    return out[: len(x)].to(x.dtype)


def _kitchen() -> Any:
    import comfy_kitchen

    return comfy_kitchen


def gemlite(format: Format) -> list[Kernel]:
    """gemlite's products for CUDA that compute what a matrix of `format` says. It tries settings of its own for each
    shape, which takes long the first time."""
    version = f"{version_of(GEMLITE)} {OWN_VERSION}"

    def missing(device: torch.device) -> str | None:
        return f"{GEMLITE} is not installed" if version_of(GEMLITE) is None else None

    if isinstance(format, PerRow):

        def of_rows(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
            settings = _Gemlite(8, 255, x.shape[1], 1, AFTER_THE_SUM, NO_GROUPS, contiguous=False)
            nothing = torch.empty(1, 0, dtype=torch.int32, device=x.device)
            return settings.product(x, weight.t(), scale[None], nothing)

        return [Kernel(GEMLITE, of_rows, version=version, missing=missing)]
    if isinstance(format, Int4) and format.scale_dtype == torch.bfloat16:

        def of_groups(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
            settings = _Gemlite(4, 15, format.group, 8, IN_GROUPS, SCALE_AND_ADD, contiguous=True)
            return settings.product(x, weight, *scale.unbind(0))

        return [Kernel(GEMLITE, of_groups, _words, None, _from_zero, version=version, missing=missing)]
    return []


# How gemlite calls where scales are applied, and what they are in groups.
IN_GROUPS, AFTER_THE_SUM = 0, 1
NO_GROUPS, SCALE_AND_ADD = 0, 4


def _words(weight: Tensor) -> Tensor:
    """Eight columns in an int32, the first in its lowest bits; (columns / 8, rows)."""
    return Swapped("swapped", 2 * weight.shape[1], tiled=False).pack(weight).view(torch.int32).t().contiguous()


def _from_zero(scale: Tensor) -> Tensor:
    """(2, groups, rows): scales, and what is added to integers that count from 0, where ours count from -8."""
    factor, zero = scale.float().unbind(2)
    return torch.stack([factor, zero - 8 * factor]).to(scale.dtype)


@dataclass(frozen=True)
class _Gemlite:
    """The arguments of one of its products: a matrix of `bits`, so many columns in a group and in a word."""

    bits: int
    mask: int
    group: int
    in_word: int
    scaled: int
    grouped: int
    contiguous: bool

    def product(self, x: Tensor, weight: Tensor, scale: Tensor, added: Tensor) -> Tensor:
        """x times the matrix, computed in the dtype of its scale and added up in float32."""
        from gemlite.core import TORCH_TO_DTYPE, DType, forward_functional

        computed = TORCH_TO_DTYPE[scale.dtype].value
        meta = [0, self.bits, self.group, self.mask, self.in_word, computed, computed, DType.FP32.value, computed]
        meta += [self.scaled, self.grouped, int(self.contiguous)]
        out: Tensor = forward_functional(x.to(scale.dtype), None, [weight, scale, added], meta)
        return out.to(x.dtype)
