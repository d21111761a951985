"""Matrices as GPTQ and AutoRound pack them: `qweight`, `qzeros` and `scales`, value = scale * (q - zero).

A column of `qweight` (columns / 8, rows) int32 holds a row of the matrix, eight values of 4 bits in each number, the
first in its lowest bits; `qzeros` (groups, rows / 8) holds zeros alike, by an old mistake less one in all but the
second version of the format; `scales` is (groups, rows). Repacked, values and scales are what they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import NextStepError, plainly, shown
from ..runtime.quantization.formats import Int4
from ..sentences import Sentence, Words
from .checkpoint import TensorFiles, read_small
from .stored import StoredMatrix, derived, held_shape, misfit

QUANTIZATION_CONFIG = "quantization_config"  # in config.json
QWEIGHT, QZEROS, SCALES, ORDER = ".qweight", ".qzeros", ".scales", ".g_idx"
METHODS = ("auto-round", "gptq")
BITS, IN_A_NUMBER = 4, 8
# How files say that zeros are stored as they are; else they are stored less one.
PLAIN_ZEROS = {"packing_format": ("auto_round", "auto_round:gptqmodel"), "checkpoint_format": ("gptq_v2",)}
LESS_ONE = {"packing_format": ("auto_round:auto_gptq", "auto_round:gptq"), "checkpoint_format": ("gptq",)}


def description(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json says of how its checkpoint was quantized; None where it says nothing."""
    said = config.get(QUANTIZATION_CONFIG)
    return said if isinstance(said, dict) else None


def find(files: TensorFiles, config: Mapping[str, Any], where: Words) -> dict[str, StoredMatrix]:
    """The packed matrices of a checkpoint by the names of their layers.

    NextStepError, before a weight is read, for a packing, a number of bits or an order of columns that is another.
    """
    layers = [name.removesuffix(QWEIGHT) for name in files.shapes if name.endswith(QWEIGHT)]
    said = description(config)
    if not layers:
        if said is not None:
            raise NextStepError(
                "{where} says that its weights are quantized ({method}), but no packed matrices of a kind that can be "
                "read were found beside it. Use the original checkpoint or one that AutoRound or GPTQ packed.",
                where=where,
                method=shown(said.get("quant_method")),
            )
        return {}
    if said is None or said.get("quant_method") not in METHODS:
        raise NextStepError(
            "{where} has no quantization_config with the quant_method {methods}, which packed weights need to be "
            "read. Download the file again.",
            where=where,
            methods=" or ".join(METHODS),
        )
    offset = _zero_offset(said, where)
    return {layer: _matrix(files, layer, offset, where) for layer in layers}


def name_of(config: Mapping[str, Any]) -> str:
    """What users call the format of a checkpoint with this config.json and packed matrices."""
    return f"{config[QUANTIZATION_CONFIG]['quant_method']} int4"


def _zero_offset(said: Mapping[str, Any], where: Words) -> int:
    """What is to be added to a stored zero."""
    if said.get("bits", BITS) != BITS:
        raise _unreadable(where, Sentence("{bits} bits", bits=shown(said["bits"])), Sentence("{bits} bits", bits=BITS))
    key = "packing_format" if said["quant_method"] == "auto-round" else "checkpoint_format"
    packing = said.get(key) or LESS_ONE[key][0]
    if packing in PLAIN_ZEROS[key]:
        return 0
    if packing in LESS_ONE[key]:
        return 1
    raise _unreadable(where, shown(packing), ", ".join((*LESS_ONE[key], *PLAIN_ZEROS[key])))


def _unreadable(where: Words, found: Words, expected: Words) -> NextStepError:
    return NextStepError(
        "{where} describes weights that are packed with {found}; what can be read is {expected}. Use another "
        "checkpoint, or quantize the original while loading.",
        where=where,
        found=found,
        expected=expected,
    )


def _matrix(files: TensorFiles, layer: str, offset: int, where: Words) -> StoredMatrix:
    packed, rows = held_shape(files, layer + QWEIGHT, 2)
    groups, scaled = held_shape(files, layer + SCALES, 2)
    columns = packed * IN_A_NUMBER
    if scaled != rows or not groups or columns % groups:
        raise misfit(files, layer + SCALES)
    group = columns // groups
    if held_shape(files, layer + QZEROS, 2) != (groups, -(-rows // IN_A_NUMBER)):
        raise misfit(files, layer + QZEROS)
    names = [layer + QWEIGHT, layer + QZEROS, layer + SCALES]
    if layer + ORDER in files.shapes:
        _check_order(files, layer + ORDER, columns, group, where)
        names.append(layer + ORDER)
    format = Int4(f"int4-g{group}", group, torch.float32)

    def weight_of(qweight: Tensor) -> Tensor:
        weight = _bytes(qweight).permute(1, 0, 2).reshape(rows, columns // 2)
        return weight << 4 | weight >> 4

    def scale_of(qzeros: Tensor, scales: Tensor) -> Tensor:
        zeros, scale = _nibbles(qzeros)[:, :rows] + offset, scales.float()
        return torch.stack([scale, (8 - zeros.float()) * scale], dim=2)

    weight, scale = derived(files, weight_of, names[0]), derived(files, scale_of, *names[1:3])
    return StoredMatrix(format, rows, columns, weight, scale, tuple(names))


def _check_order(files: TensorFiles, name: str, columns: int, group: int, where: Words) -> None:
    if files.shapes[name] != (columns,):
        raise misfit(files, name)
    if not torch.equal(read_small(files.locations[name][0]).long(), torch.arange(columns) // group):
        raise NextStepError(
            "{where}: {tensor} says that columns were reordered (desc_act), which cannot be read. Use a checkpoint "
            "that was quantized without desc_act.",
            where=where,
            tensor=plainly(name),
        )


def _bytes(packed: Tensor) -> Tensor:
    """(n, m) int32 as (n, m, 4) bytes, the lowest first."""
    return packed.contiguous().view(torch.uint8).view(*packed.shape, 4)


def _nibbles(packed: Tensor) -> Tensor:
    """(n, m) int32 as (n, 8 m) values of 4 bits, the lowest first."""
    pairs = _bytes(packed)
    return torch.stack([pairs & 15, pairs >> 4], dim=3).view(len(packed), -1)
