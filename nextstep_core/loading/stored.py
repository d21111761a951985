"""Matrices that another program has quantized, as files hold them, brought into formats of ours: the same values.

`gptq` and `comfy_quant` know how such files name and pack them. A matrix whose format no layer of ours multiplies by,
the text embedding say, is turned into floats while it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import NextStepError, plainly
from ..model.config import NextStepConfig
from ..runtime.quantization import Held
from ..runtime.quantization.formats import Format
from .checkpoint import Derived, Shape, Source, TensorFiles, places_of
from .fusion import parts_of

PIECE = 1024  # rows that are turned into floats at once
WEIGHT = ".weight"


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix (rows, columns) in a file: where its weight and scale come from, as `format` has them, and the names of
    the tensors that it takes up. A weight that the file holds so is that, and is not copied."""

    format: Format
    rows: int
    columns: int
    weight: Source
    scale: Derived
    names: tuple[str, ...]

    def floats(self, dtype: torch.dtype) -> Derived:
        """The numbers that both stand for."""
        places = tuple(places_of([self.weight]))

        def make(*raw: Tensor) -> Tensor:
            held, scale = raw[: len(places)], self.scale.make(*raw[len(places) :])
            weight = self.weight.make(*held) if isinstance(self.weight, Derived) else held[0]
            whole = torch.empty(self.rows, self.columns, dtype=dtype)
            for start in range(0, self.rows, PIECE):
                rows = slice(start, start + PIECE)
                of_rows = scale[rows] if scale.ndim == 1 else scale[:, rows]
                whole[rows] = self.format.dequantize(weight[rows], of_rows, torch.float32)
            return whole

        return Derived((*places, *self.scale.places), make)


def bring_in(
    files: TensorFiles,
    matrices: Mapping[str, StoredMatrix],
    beside: Iterable[str],
    linears: Iterable[str],
    config: NextStepConfig,
    name: str,
) -> tuple[TensorFiles, Held]:
    """The files with `matrices` (by the layer's name) under the names that our layers give their weights and without
    what lies `beside` them, and what the model's `linears` then hold.

    The parts of a fused layer stay quantized where all of them have one format.
    """
    taken = {name for matrix in matrices.values() for name in matrix.names} | set(beside)
    locations = {name: sources for name, sources in files.locations.items() if name not in taken}
    shapes = {name: shape for name, shape in files.shapes.items() if name not in taken}
    dtypes = {name: dtype for name, dtype in files.dtypes.items() if name not in taken}
    formats: dict[str, Format] = {}
    for linear in linears:
        parts = [part.removesuffix(WEIGHT) for part in parts_of(linear + WEIGHT, config)] or [linear]
        found = [matrices[part] for part in parts if part in matrices]
        rows = sum(matrix.rows for matrix in found)
        if (
            len(found) == len(parts)
            and len({m.format for m in found}) == 1
            and found[0].format.fits(rows, found[0].columns)
        ):
            formats[linear] = found[0].format
            for part, matrix in zip(parts, found):
                weight, scale = found[0].format.empty(matrix.rows, matrix.columns, "meta")
                for own, source, like in (
                    (part + WEIGHT, matrix.weight, weight),
                    (f"{part}{WEIGHT}_scale", matrix.scale, scale),
                ):
                    locations[own], shapes[own], dtypes[own] = (source,), tuple(like.shape), like.dtype
    kept = {part for linear in formats for part in parts_of(linear + WEIGHT, config) or (linear + WEIGHT,)}
    plain = next((d for n, d in files.dtypes.items() if n.endswith("norm.weight") and d is not None), torch.float32)
    for layer, matrix in matrices.items():
        own = layer + WEIGHT
        if own not in kept:
            locations[own], dtypes[own] = (matrix.floats(plain),), plain
            shapes[own] = (matrix.rows, matrix.columns)
    return replace(files, locations=locations, shapes=shapes, dtypes=dtypes), Held(name, formats)


def derived(files: TensorFiles, make: Callable[..., Tensor], *names: str) -> Derived:
    """What `make` makes of these tensors of the files."""
    return Derived(tuple(places_of(source for name in names for source in files.locations[name])), make)


def held_shape(files: TensorFiles, name: str, axes: int | None = None) -> Shape:
    """The shape of a tensor that a quantized matrix needs; NextStepError where it is missing or has other axes."""
    shape = files.shapes.get(name)
    if shape is None:
        raise NextStepError(
            "{where} lacks {tensor}, without which a quantized matrix cannot be read. Download the file again.",
            where=files.where,
            tensor=plainly(name),
        )
    if axes is not None and len(shape) != axes:
        raise misfit(files, name)
    return shape


def misfit(files: TensorFiles, name: str) -> NextStepError:
    """A tensor of a quantized matrix whose shape does not go with the others."""
    return NextStepError(
        "{where}: {tensor} is {shape}, which does not fit the other tensors of its matrix. Download the file again.",
        where=files.where,
        tensor=plainly(name),
        shape=str(list(files.shapes[name])),
    )
