"""A good checkpoint with one JSON file that is not: config.json, the VAE's, generation_config.json, the index."""

from __future__ import annotations

from pathlib import Path
from random import Random

from torch import Tensor

from . import good
from .case import Case
from .json_mutation import mutated

FILES = ("config.json", "vae/config.json", "generation_config.json", "model.safetensors.index.json")
RECIPES = (None, None, "int8", "int4", "fp8")


def warm_up() -> None:
    good.draw(good.CHECKPOINT)


def case(rng: Random) -> Case:
    file, quantization = rng.choice((*FILES[:2], *FILES)), rng.choice(RECIPES)
    what, text = mutated((good.CHECKPOINT / file).read_text(), rng)

    def attempt(folder: Path) -> Tensor:
        good.put(good.lay_out(folder) / file, text)
        return good.draw(folder, quantization=quantization)

    return Case(f"{file}: {what}", attempt, good.SHAPE)
