"""Matrices as ComfyUI's own quantized files hold them, to be read and to be written.

A layer's `comfy_quant` is a text of JSON in bytes that names its format; some files have these texts in their metadata
instead, and older ones only mark that all matrices with a `scale_weight` are fp8. Beside the weight lie its scales: one
of the whole matrix or one a row. Where `convrot` is set, groups of columns were rotated (`formats.Rotated`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import NextStepError, plainly, shown
from ..runtime.quantization.formats import Int4, PerRow, Rotated
from ..sentences import Sentence
from .checkpoint import TensorFiles, read_small
from .documents import file_metadata, parse_object
from .stored import StoredMatrix, derived, held_shape, misfit

MARK, METADATA, OLD_MARK = "comfy_quant", "_quantization_metadata", "scaled_fp8"
LONGEST_TEXT = 4096  # bytes of JSON that a layer may have
ROTATED = (4, 16, 64, 256, 1024)  # columns in a group
INT8 = PerRow("int8", torch.int8, 127.0, torch.float32)
FP8 = {
    "float8_e4m3fn": PerRow("fp8", torch.float8_e4m3fn, 448.0, torch.float32),
    "float8_e5m2": PerRow("fp8 e5m2", torch.float8_e5m2, 57344.0, torch.float32),
}
INT4_GROUPS = (256, 128, 64, 32)  # columns, of those that products take
IN_A_BYTE = 2


def find(files: TensorFiles) -> tuple[dict[str, StoredMatrix], frozenset[str]]:
    """The quantized matrices of a file by the names of their layers, and the tensors beside them that mean nothing to
    weights (marks, scales of inputs).

    NextStepError, before a weight is read, for a format that cannot be read.
    """
    described = _described(files)
    if not described:
        return {}, frozenset()
    beside = {
        name for name in files.shapes if name.rpartition(".")[2] in (MARK, OLD_MARK, "input_scale", "scale_input")
    }
    return {layer: _matrix(files, layer, said) for layer, said in described.items()}, frozenset(beside)


def name_of(matrices: Mapping[str, StoredMatrix]) -> str:
    """What users call the format of a file with these matrices."""
    return f"ComfyUI {' and '.join(sorted({matrix.format.name for matrix in matrices.values()}))}"


def _described(files: TensorFiles) -> dict[str, Mapping[str, Any]]:
    """What is said of each quantized layer."""
    described: dict[str, Mapping[str, Any]] = {}
    for name in files.shapes:
        layer, _, last = name.rpartition(".")
        if last == MARK:
            described[layer] = _text_of(files, name)
        elif last == "scale_weight":
            described[layer] = {"format": "float8_e4m3fn"}
    return described or _in_metadata(files)


def _text_of(files: TensorFiles, name: str) -> Mapping[str, Any]:
    (length,) = held_shape(files, name, 1)
    if length > LONGEST_TEXT or files.dtypes.get(name) != torch.uint8:
        raise misfit(files, name)
    text = read_small(files.locations[name][0]).numpy().tobytes().decode("utf-8", "replace")
    return parse_object(text, Sentence("{where} ({tensor})", where=files.where, tensor=plainly(name)))


def _in_metadata(files: TensorFiles) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for path in sorted(files.paths):
        text = file_metadata(path).get(METADATA) if path.suffix in (".safetensors", ".sft") else None
        layers = parse_object(text, str(path)).get("layers") if text is not None else None
        for layer, said in (layers if isinstance(layers, dict) else {}).items():
            ours = layer.removeprefix("model.")
            if isinstance(said, dict) and f"{ours}.weight" in files.shapes:
                found[ours] = said
    return found


def _matrix(files: TensorFiles, layer: str, said: Mapping[str, Any]) -> StoredMatrix:
    format = said.get("format")
    read = READ.get(format) if isinstance(format, str) else None
    if read is None:
        raise NextStepError(
            "{where}: {layer} is stored as {format}, which cannot be read here; what can be read is {known}. Use "
            "another file, or quantize the original while loading.",
            where=files.where,
            layer=plainly(layer),
            format=shown(format),
            known=", ".join(READ),
        )
    return read(files, layer, said)


def _per_row(files: TensorFiles, layer: str, said: Mapping[str, Any], inner: PerRow) -> StoredMatrix:
    rows, columns = _weight(files, layer, inner.dtype)
    scale = next((n for n in (f"{layer}.weight_scale", f"{layer}.scale_weight") if n in files.shapes), None)
    scale = scale or f"{layer}.weight_scale"
    if held_shape(files, scale) not in ((), (1,), (1, 1), (rows,), (rows, 1)):
        raise misfit(files, scale)

    def scale_of(scales: Tensor) -> Tensor:
        return scales.float().flatten().expand(rows).contiguous()

    format = Rotated(inner, _rotated(files, layer, said, columns)) if _says(said, "convrot", False) else inner
    (weight,) = files.locations[f"{layer}.weight"]
    return StoredMatrix(format, rows, columns, weight, derived(files, scale_of, scale), (f"{layer}.weight", scale))


def _w4a4(files: TensorFiles, layer: str, said: Mapping[str, Any]) -> StoredMatrix:
    """Signed values of 4 bits, the even column's in the low half of a byte, with one scale a row."""
    rows, bytes_of_row = _weight(files, layer, torch.int8)
    columns, scale = bytes_of_row * IN_A_BYTE, f"{layer}.weight_scale"
    group = next((group for group in INT4_GROUPS if columns % group == 0), None)
    if held_shape(files, scale) not in ((rows,), (rows, 1)) or group is None:
        raise misfit(files, scale)

    def weight_of(weight: Tensor) -> Tensor:
        low_first = weight.view(torch.uint8) ^ 0x88  # from -8..7 to 0..15 in both halves
        return low_first << 4 | low_first >> 4

    def scale_of(scales: Tensor) -> Tensor:
        scale = scales.float().view(1, rows, 1).expand(columns // group, rows, 1)
        return torch.cat([scale, torch.zeros_like(scale)], dim=2)

    format = Rotated(Int4(f"int4-g{group}", group, torch.float32), _rotated(files, layer, said, columns))
    weight = derived(files, weight_of, f"{layer}.weight")
    return StoredMatrix(format, rows, columns, weight, derived(files, scale_of, scale), (f"{layer}.weight", scale))


def _w4a8(files: TensorFiles, layer: str, said: Mapping[str, Any]) -> StoredMatrix:
    """Values of 4 bits that stand for whole numbers of 8 bits: by a table, times the scale of their group."""
    rows, bytes_of_row = _weight(files, layer, torch.int8)
    columns, names = bytes_of_row * IN_A_BYTE, [f"{layer}.weight{part}" for part in ("", "_s_rel", "_s_channel")]
    if f"{layer}.weight_correction" in files.shapes:
        raise misfit(files, f"{layer}.weight_correction")
    group = _says(said, "group_size", 16)
    if (
        type(group) is not int
        or group < 1
        or columns % group
        or held_shape(files, names[1], 2) != (rows, columns // group)
    ):
        raise misfit(files, names[1])
    if held_shape(files, names[2], 1) != (rows,):
        raise misfit(files, names[2])
    if (table := f"{layer}.weight_codebook") in files.shapes:
        names.append(table)
        if held_shape(files, table, 1) != (16,):
            raise misfit(files, table)

    def weight_of(weight: Tensor, relative: Tensor, table: Tensor | None = None) -> Tensor:
        packed = weight.view(torch.uint8)
        values = torch.stack([packed & 15, packed >> 4], dim=2).view(rows, columns // group, group)
        levels = torch.arange(16.0) - 8 if table is None else table.float()
        scale = relative.view(torch.float8_e4m3fn) if relative.dtype == torch.uint8 else relative
        whole = levels[values.int()] * scale.float()[..., None]
        return whole.round_().clamp_(-127, 127).to(torch.int8).view(rows, columns)

    format = Rotated(INT8, _rotated(files, layer, said, columns))
    of_row = names.pop(2)
    weight, scale = derived(files, weight_of, *names), derived(files, Tensor.float, of_row)
    return StoredMatrix(format, rows, columns, weight, scale, (*names, of_row))


def _weight(files: TensorFiles, layer: str, dtype: torch.dtype) -> tuple[int, int]:
    rows, columns = held_shape(files, f"{layer}.weight", 2)
    if files.dtypes.get(f"{layer}.weight") != dtype:
        raise NextStepError(
            "{where}: {tensor} is not stored as {dtype}, as its format asks. Download the file again.",
            where=files.where,
            tensor=plainly(f"{layer}.weight"),
            dtype=str(dtype).removeprefix("torch."),
        )
    return rows, columns


def _says(said: Mapping[str, Any], key: str, otherwise: Any) -> Any:
    """A layer's setting, which stands by itself or among `params`."""
    params = said.get("params")
    return said.get(key, params.get(key, otherwise) if isinstance(params, dict) else otherwise)


def _rotated(files: TensorFiles, layer: str, said: Mapping[str, Any], columns: int) -> int:
    group = _says(said, "convrot_groupsize", 256)
    if group not in ROTATED or columns % group:
        raise NextStepError(
            "{where}: {layer} was rotated in groups of {group}; possible are {possible} that divide its {columns} "
            "columns. Download the file again.",
            where=files.where,
            layer=plainly(layer),
            group=shown(group),
            possible=", ".join(map(str, ROTATED)),
            columns=columns,
        )
    return int(group)


Read = Callable[[TensorFiles, str, Mapping[str, Any]], StoredMatrix]


def _as_rows(inner: PerRow) -> Read:
    return lambda files, layer, said: _per_row(files, layer, said, inner)


READ: dict[str, Read] = {
    "int8_tensorwise": _as_rows(INT8),
    **{name: _as_rows(format) for name, format in FP8.items()},
    "convrot_w4a4": _w4a4,
    "asym_w4a8_int8": _w4a8,
}
