"""A checkpoint of the published shape with random weights, to try loading and quantizing at true scale.

    python -m benchmarks.checkpoint FOLDER               # 14.95 billion parameters, 30 GB
    python -m benchmarks.checkpoint FOLDER --shape medium

Layout, names and file sizes are those of the published checkpoints; tokenizer and VAE are the embedded model's, so
that it can be chosen in a loader and draws noise.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextstep_core.loading.build import empty_model
from nextstep_core.loading.checkpoint import INDEX_NAME, shapes_of
from nextstep_core.loading.documents import CONFIG, TOKENIZER, TOKENIZER_CONFIG
from nextstep_core.loading.fusion import published_shapes
from nextstep_core.loading.single_file import StreamedFile
from nextstep_core.loading.store import ASSETS, EMBEDDED
from nextstep_core.model.config import NextStepConfig
from nextstep_core.model.nextstep import TextEmbedding

from .subjects import BIAS_STD, GAIN, PUBLISHED_CONFIG, SHAPES

VOCABULARY = 152064  # of Qwen2.5-14B; its embedding and the language head are a tenth of the file
SHARD_BYTES = 5_000_000_000
POOL = 1 << 24  # normal numbers drawn once; weights are stretches of them, since drawing all would take much longer
SPECIAL = ("boi", "eoi", "image_placeholder_id", "pad_token_id_added", "pad_token_id")


def description_of(shape: dict[str, int]) -> dict[str, Any]:
    """The config.json of a checkpoint of this shape that the embedded model's tokenizer goes with."""
    embedded = json.loads((ASSETS / EMBEDDED / CONFIG).read_text())
    return (
        PUBLISHED_CONFIG
        | {name: embedded[name] for name in SPECIAL}
        | {"vocab_size": VOCABULARY, "vae_name_or_path": "vae/"}
        | shape
    )


def tensors_of(config: NextStepConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor as published checkpoints have them, the language head included."""
    shapes = shapes_of(empty_model(config)) | shapes_of(TextEmbedding(config, device="meta"))
    return published_shapes(shapes, (), config) | {"lm_head.weight": (config.vocab_size, config.hidden_size)}


def shards_of(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, Tensor]]:
    """The tensors without memory, in files of at most SHARD_BYTES."""
    shard: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor
    yield shard


class RandomWeights:
    """Weights of a plausible size for each tensor, from one pool of normal numbers."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._pool = torch.randn(POOL, generator=generator)
        self._generator = generator

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor in bfloat16: ones for a norm, small for a bias, and what keeps the variance for a matrix."""
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(shape, dtype=torch.bfloat16)
        std = BIAS_STD if len(shape) == 1 else GAIN * shape[-1] ** -0.5
        count, start = math.prod(shape), int(torch.randint(POOL, (), generator=self._generator))
        stretch = (self._pool * std).bfloat16().roll(-start)
        return stretch.repeat(-(-count // POOL))[:count].view(shape)


def write_checkpoint(folder: Path, shape: dict[str, int]) -> int:
    """Write a checkpoint of a shape such as those of `SHAPES` into an empty or new folder; its parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    description = description_of(shape)
    shapes, weights = tensors_of(NextStepConfig.from_dict(description)), RandomWeights()
    shards, held = list(shards_of(shapes)), {}
    for number, like in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with StreamedFile(path, like, {"format": "pt"}) as file:
            for name, tensor in like.items():
                file.write(name, weights.tensor(name, tuple(tensor.shape)))
        held |= dict.fromkeys(like, path.name)
    size = sum(t.nbytes for like in shards for t in like.values())
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": held}))
    (folder / CONFIG).write_text(json.dumps(description, indent=1))
    for name in (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json"):
        shutil.copy(ASSETS / EMBEDDED / name, folder)
    shutil.copytree(ASSETS / EMBEDDED / "vae", folder / "vae", dirs_exist_ok=True)
    return sum(math.prod(shape) for shape in shapes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    parser.add_argument("--shape", choices=SHAPES, default="14b", help="default: that of the published checkpoints")
    parser.add_argument("--layers", type=int, help="so many of the transformer's layers alone")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    layers = shape["num_hidden_layers"] if options.layers is None else options.layers
    parameters = write_checkpoint(options.folder, shape | {"num_hidden_layers": layers})
    print(f"{options.folder}: {parameters / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    main()
