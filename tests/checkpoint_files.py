"""Checkpoint folders for tests: changed configs, and weights of any size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from nextstep_core.loading.checkpoint import shapes_of
from nextstep_core.loading.fusion import published_shapes
from nextstep_core.model.config import NextStepConfig
from nextstep_core.model.nextstep import NextStepModel, TextEmbedding

INDEX = "model.safetensors.index.json"


def edit_json(path: Path, **changes) -> None:
    """Change keys of a JSON file; the value "<remove>" removes one."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v != "<remove>"}))


def make_wide(folder: Path, fill: Callable[[tuple[int, ...]], torch.Tensor] = torch.zeros) -> tuple[int, int]:
    """Float32 zeros, or what `fill` makes, of the folder's config in shards of one layer each; (bytes of the largest
    shard, bytes of the model in bf16)."""
    config = NextStepConfig.from_dict(json.loads((folder / "config.json").read_text()))
    modules = (NextStepModel(config, device="meta"), TextEmbedding(config, device="meta"))
    shapes = published_shapes(shapes_of(modules[0]) | shapes_of(modules[1]), held=(), config=config)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        key = name.split(".")[1] if name.startswith("layers.") else "rest"
        shards.setdefault(f"model-{key}.safetensors", {})[name] = shape
    for file, held in shards.items():
        save_file({name: fill(shape) for name, shape in held.items()}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    largest = max((folder / file).stat().st_size for file in shards)
    return largest, sum(math.prod(shape) for shape in shapes.values()) * 2
