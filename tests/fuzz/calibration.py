"""A good calibration, changed at random: it is refused, or int4 is fitted to it; and what is asked for to make one."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from nextstep_core import NextStepPipeline
from nextstep_core.loading.build import plan_model
from nextstep_core.loading.calibration import PROMPTS, load_calibration, save_calibration
from nextstep_core.loading.compensated import Compensated
from tests.hostile_files import HEADERS

from . import good
from .case import Case
from .prompts import PIECES
from .settings import GOOD, NEARLY, NONE
from .weights import ANY, OF_KIND, files

WEIGHTS = "0123456789"
TEXTS = ("A red apple.", "Two cats.")
NUMBERS = ("width", "height", "seed")


@lru_cache
def pipeline() -> NextStepPipeline:
    return NextStepPipeline.from_pretrained(good.CHECKPOINT, dtype=torch.float32)


@lru_cache
def written() -> bytes:
    """The good file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.safetensors"
        save_calibration(path, pipeline().calibrate(TEXTS, height=32, width=32), WEIGHTS)
        return path.read_bytes()


def warm_up() -> None:
    written()
    files()  # of which a change may take one in its place


def case(rng: Random) -> Case:
    return rng.choice((_file, _file, _file, _asked))(rng)


def _file(rng: Random) -> Case:
    if rng.random() < 0.1:
        name = rng.choice(sorted(HEADERS))
        what, write = name, HEADERS[name]
    else:
        what, data = rng.choice([*ANY, *OF_KIND[".safetensors"]])(written(), rng)

        def write(path: Path) -> None:
            path.write_bytes(data)

    def attempt(folder: Path) -> None:
        path = folder / "c.safetensors"
        write(path)
        plan = plan_model(good.CHECKPOINT, "int4")
        compensated = Compensated(plan, load_calibration(path, plan.config, WEIGHTS))
        stored = dict(compensated.read(torch.float32))
        assert compensated.error is not None and 0 <= compensated.error < 1, compensated.error
        assert all(tensor.isfinite().all() for tensor in stored.values() if tensor.is_floating_point())

    return Case(f"calibration: {what}", attempt)


def _asked(rng: Random) -> Case:
    asked: dict[str, Any] = {"height": 32, "width": 32, "seed": 1}
    prompts: Any = rng.choice((TEXTS, [rng.choice(PIECES) for _ in range(rng.choice((1, 2, 3, PROMPTS.maximum + 1)))]))
    name = rng.choice(("prompts", *NUMBERS))
    value = rng.choice(NONE) if name == "prompts" else rng.choice((*GOOD[name], *NEARLY[name], *NONE))
    if name == "prompts" and rng.random() < 0.5:
        prompts = value
    elif name != "prompts":
        asked[name] = value

    def attempt(_: Path) -> None:
        drawn = pipeline().calibrate(prompts, **asked)
        assert drawn.pictures == len(prompts) and drawn.tokens.isfinite().all()

    return Case(f"calibrate: {name}, {type(value).__name__}", attempt)
