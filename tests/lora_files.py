"""LoRA files for tests: of random matrices, in the layouts that trainers write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nextstep_core.loading.lora_file import slots_of
from nextstep_core.model.config import NextStepConfig

Named = Callable[[str, str], str]  # from a layer and "A", "B" or "alpha" to the name of a tensor


def peft(layer: str, part: str) -> str:
    return f"base_model.model.{layer}.lora_{part}.weight"


def kohya(layer: str, part: str) -> str:
    ending = {"A": "lora_down.weight", "B": "lora_up.weight", "alpha": "alpha"}[part]
    return f"lora_unet_{layer.replace('.', '_')}.{ending}"


def matrices(config: NextStepConfig, rank: int = 3, layers: Iterable[str] | None = None, seed: int = 0) -> dict:
    """A and B (rank, columns) and (rows, rank) of layers, by default of all, by their published names."""
    draw = torch.Generator().manual_seed(seed)
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for name, slot in slots_of(config).items():
        down = torch.randn(rank, slot.columns, generator=draw) / slot.columns**0.5
        up = torch.randn(slot.rows, rank, generator=draw) / 8
        if layers is None or name in layers:
            made[name] = down, up
    return made


def write(
    path: Path, pairs: dict, named: Named = peft, alpha: float | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    """A file of these pairs; `alpha` stands in tensors of its own."""
    tensors = {}
    for layer, (down, up) in pairs.items():
        tensors |= {named(layer, "A"): down.to(dtype), named(layer, "B"): up.to(dtype)}
        if alpha is not None:
            tensors[named(layer, "alpha")] = torch.tensor(alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def write_config(folder: Path, **stated: object) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | stated))
