"""gemlite's products, for those who install it: kernels for Triton.

It finds settings of its own for each shape and number of rows, by compiling a dozen of them: minutes for a model, once
for a device, as they are written down in the cache folder.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..devices import current
from ..ledger import cache_folder
from .formats import Format, Int4, PerRow
from .kernel import OWN_VERSION, Kernel
from .layouts import Swapped
from .libraries import version_of

GEMLITE = "gemlite"
MOST_ROWS = 32  # for more it has another kernel, which no trial has seen
FP8_FROM = (8, 9)  # compute capability

# How gemlite calls where scales are applied, and what they are in groups.
IN_GROUPS, AFTER_THE_SUM = 0, 1
NO_GROUPS, SCALE_AND_ADD = 0, 4


def products(format: Format) -> list[Kernel]:
    """gemlite's products for CUDA that compute what a matrix of `format` says."""
    version = f"{version_of(GEMLITE)} {version_of('triton')} {OWN_VERSION}"
    floats = isinstance(format, PerRow) and format.dtype.is_floating_point

    def missing(device: torch.device) -> str | None:
        if version_of(GEMLITE) is None:
            return f"{GEMLITE} is not installed"
        if find_spec("triton") is None:
            return "Triton is not installed"
        old = device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_FROM
        return "the card has no fp8" if floats and old else None

    if isinstance(format, PerRow):

        def of_rows(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
            nothing = torch.empty(1, 0, dtype=torch.int32, device=x.device)
            return _product(x, weight.t(), scale[None], nothing, None)

        return [Kernel(GEMLITE, of_rows, most_rows=MOST_ROWS, version=version, missing=missing)]
    if isinstance(format, Int4) and format.scale_dtype == torch.bfloat16:

        def of_groups(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
            if len(x) > MOST_ROWS:
                return F.linear(x, _of_words(format, weight, scale).to(x.dtype))
            factor, added = scale.unbind(0)
            return _product(x, weight, factor, added, format.group)

        return [Kernel(GEMLITE, of_groups, _words, None, _from_zero, version=version, missing=missing)]
    return []


def _words(weight: Tensor) -> Tensor:
    """Eight columns in an int32, the first in its lowest bits; (columns / 8, rows)."""
    return Swapped("swapped", 2 * weight.shape[1], tiled=False).pack(weight).view(torch.int32).t().contiguous()


def _of_words(format: Int4, words: Tensor, scale: Tensor) -> Tensor:
    """The matrix that words and scales from zero stand for, in the dtype of the scales."""
    columns = 8 * len(words)
    values = format.values(Swapped("swapped", columns, tiled=False).unpack(words.t()))
    factor, added = (part.t()[..., None] for part in scale)
    groups: Tensor = values.to(scale.dtype).view(len(values), -1, format.group) * factor + added
    return groups.view(-1, columns)


def _from_zero(scale: Tensor) -> Tensor:
    """(2, groups, rows): scales, and what is added to integers that count from 0, where ours count from -8."""
    factor, zero = scale.float().unbind(2)
    return torch.stack([factor, zero - 8 * factor]).to(scale.dtype)


def _product(x: Tensor, weight: Tensor, scale: Tensor, added: Tensor, group: int | None) -> Tensor:
    """x times a matrix of int4 in groups of `group` columns, or of bytes with a scale for each row where that is None;
    computed in the dtype of the scale.

    The parts of a sum are added in memory, in any order: in float32, as those of bfloat16 would lose a few percent.
    """
    core = _gemlite(x.device)
    computed, exact = core.TORCH_TO_DTYPE[scale.dtype].value, core.DType.FP32.value
    # bits, columns of a group, mask of a value, values in a word; at the end where scales are applied, what they are in
    # groups, and whether weights are contiguous
    if group is None:
        stored, scaled = [8, x.shape[1], 255, 1], [AFTER_THE_SUM, NO_GROUPS, 0]
    else:
        stored, scaled = [4, group, 15, 8], [IN_GROUPS, SCALE_AND_ADD, 1]
    meta = [0, *stored, computed, exact, exact, computed, *scaled]
    with current(x.device):
        out = core.forward_functional(x.to(scale.dtype), None, [weight, scale, added], meta)
    _keep_settings(x.device, len(x), weight.shape, group)
    result: Tensor = out.to(x.dtype)
    return result


@cache
def _gemlite(device: torch.device) -> Any:
    """Its module, with the settings that an earlier start found on this device."""
    with current(device):
        from gemlite import core
    path = _settings_path(device)
    if path is not None and path.exists():
        core.GemLiteLinearTriton.load_config(str(path), print_error=False)
    return core


@cache
def _keep_settings(device: torch.device, rows: int, shape: torch.Size, group: int | None) -> None:
    """Write down what it has found for a product: once for each, after it has run."""
    path = _settings_path(device)
    if path is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _gemlite(device).GemLiteLinearTriton.cache_config(str(path))


def _settings_path(device: torch.device) -> Path | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    what = f"{name} {version_of(GEMLITE)} {version_of('triton')}"
    try:
        return cache_folder() / f"gemlite-{hashlib.sha256(what.encode()).hexdigest()[:12]}.json"
    except RuntimeError:  # a user without a home
        return None
