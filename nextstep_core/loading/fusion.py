"""Checkpoints hold q, k, v and gate, up apart; the modules hold each group as one matrix. Only this file knows both.

A file may hold either form: published checkpoints the parts, files that we write the whole, which then needs no copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from ..model.config import NextStepConfig
from ..model.transformer import fused_rows
from .checkpoint import Shape, TensorFiles, rows_axis


def parts_of(name: str, config: NextStepConfig) -> dict[str, int]:
    """Names and rows of the parts that a module's tensor `name` is made of; empty for a tensor that is one."""
    for fused, rows in fused_rows(config).items():
        if f".{fused}." in name:
            block = fused.rpartition(".")[0]
            return {name.replace(fused, f"{block}.{part}"): count for part, count in rows.items()}
    return {}


def published_shapes(shapes: Mapping[str, Shape], held: Iterable[str], config: NextStepConfig) -> dict[str, Shape]:
    """The module's `shapes` as a file with the names `held` must have them: in parts, unless it holds the whole."""
    held = set(held)
    published: dict[str, Shape] = {}
    for name, shape in shapes.items():
        parts = {} if name in held else parts_of(name, config)
        axis = rows_axis(shape)
        published |= {part: (*shape[:axis], rows, *shape[axis + 1 :]) for part, rows in parts.items()} or {name: shape}
    return published


def fuse_locations(files: TensorFiles, names: Iterable[str], config: NextStepConfig) -> TensorFiles:
    """The same files with the module's `names`: those that lie in parts are read from all of their places."""
    locations, shapes = dict(files.locations), dict(files.shapes)
    for name in names:
        parts = parts_of(name, config)
        if parts and name not in locations:
            locations[name] = tuple(source for part in parts for source in files.locations[part])
            one = files.shapes[next(iter(parts))]
            axis = rows_axis(one)
            shapes[name] = (*one[:axis], sum(parts.values()), *one[axis + 1 :])
    return replace(files, locations=locations, shapes=shapes)


def split(state: Mapping[str, Tensor], config: NextStepConfig) -> dict[str, Tensor]:
    """A module's state dict with the names and parts that published checkpoints have."""
    published: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parts = parts_of(name, config)
        published |= dict(zip(parts, tensor.split(list(parts.values())))) if parts else {name: tensor}
    return published
