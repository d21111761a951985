"""How much memory a pipeline may take, and what a benchmark is asked for: at the ends, beyond them, none."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.memory import AUTO
from nextstep_core.loading.store import EMBEDDED
from nextstep_core.runtime.memory import MAX_MEMORY
from nextstep_core.runtime.quantization import RECIPES
from nextstep_core.studio.bench import RUNS, WARM_UP, bench

from .case import Case
from .settings import CHEAP, NONE, pipeline

SIZES = (16, 32, 48, 128)
COUNTS = (1, 2, 5)
LIMIT = 100_000_000


def warm_up() -> None:
    pipeline().generate("x", **CHEAP)


def case(rng: Random) -> Case:
    return rng.choice((_limited, _limited, _limited, _bench))(rng)


def _limited(rng: Random) -> Case:
    """A picture of a pipeline that is allowed so much: it comes, or it is told that it cannot."""
    # From what holds nothing to what holds all; then the ends of what is a limit, and what is none.
    limit = rng.choice(
        (
            *(rng.randrange(6_000_000, 60_000_000) for _ in range(4)),
            *(None, MAX_MEMORY.minimum, MAX_MEMORY.maximum, MAX_MEMORY.minimum - 1, MAX_MEMORY.maximum + 1),
            rng.choice(NONE),
        )
    )
    recipe = rng.choice((None, AUTO, AUTO, *RECIPES, rng.choice(NONE)))
    asked = CHEAP | {"width": rng.choice(SIZES), "height": rng.choice(SIZES)}
    count = rng.choice(COUNTS)

    def attempt(_: object) -> Tensor:
        loading: dict[str, Any] = {"max_memory": limit, "quantization": recipe}
        pipe = NextStepPipeline.from_pretrained(EMBEDDED, dtype=torch.float32, **loading)
        return pipe.generate("a red circle", num_images_per_prompt=count, **asked).images

    shape = count, asked["height"], asked["width"], 3
    return Case(f"max_memory {_shown(limit)}, quantization {_shown(recipe)}, {shape}", attempt, shape)


def _bench(rng: Random) -> Case:
    asked: dict[str, Any] = {"runs": 1, "warm_up": 0, "width": 32, "height": 32, "steps": 2}
    nearly = {"runs": RUNS.minimum - 1, "warm_up": WARM_UP.minimum - 1, "width": 40, "height": 0, "steps": 10**6}
    name = rng.choice(sorted(asked))
    asked[name] = rng.choice((asked[name], nearly[name], rng.choice(NONE)))

    def attempt(_: object) -> None:
        pipe = pipeline()
        # Its look at the memory's speed takes a part of the limit, and half a gigabyte without one.
        bench(NextStepPipeline(pipe.engine, pipe.vae, pipe.device, pipe.dtype, LIMIT), "tiny", **asked)

    return Case(f"bench with {name} {_shown(asked[name])}", attempt, None)


def _shown(value: object) -> str:
    try:
        return repr(value)[:60]
    except ValueError:  # a number of so many digits that Python prints none of them
        return "a long number"
