"""Pictures to score, and what the quality gate and the best of several are set to; drawing is a stub's."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from nextstep_core.studio.quality import measure_quality
from nextstep_core.studio.selection import Selection, agreement, best_of, quality_gate

from .case import Attempt, Case
from .settings import NONE, any_picture

SIZE = 32


def warm_up() -> None:
    measure_quality(torch.rand(16, 16, 3))


def case(rng: Random) -> Case:
    what, attempt = rng.choice((_measured, _measured, _gated, _best))(rng)
    return Case(what, attempt)


def _measured(rng: Random) -> tuple[str, Attempt]:
    picture = rng.choice((any_picture(rng), any_picture(rng), _drawn(rng)))

    def attempt(_: object) -> None:
        for name, value in measure_quality(picture).named().items():
            assert 0 <= value <= 1, f"{name} is {value}"

    return f"a picture to score: {_shape(picture)}", attempt


def _gated(rng: Random) -> tuple[str, Attempt]:
    options: dict[str, Any] = {"threshold": 0.5, "attempts": 3, "seed": 1}
    for name in rng.sample(sorted(options), rng.choice((0, 1, 1, 2))):
        options[name] = rng.choice((0, 0.0, 1, 1.0, 0.7, 100, 101, -0.1, 2**64 - 1, *NONE))
    score = rng.choice((None, None, agreement, _hostile(rng)))
    given = {} if score is None else {"score": score}
    made = Random(rng.random())
    return f"a gate: {list(options)}", lambda _: _kept(
        quality_gate(lambda seed: _drawn(made), options.pop("seed"), **options, **given)
    )


def _best(rng: Random) -> tuple[str, Attempt]:
    options: dict[str, Any] = {"candidates": 4, "kept": 0.5, "drawn": 1 / 3, "seed": 1}
    for name in rng.sample(sorted(options), rng.choice((0, 1, 1, 2))):
        options[name] = rng.choice((1, 2, 1.0, 0.01, 0.0, 64, 65, 1.1, 2**64 - 1, *NONE))
    for name in ("score", "preview_score"):
        if rng.random() < 0.3:
            options[name] = _hostile(rng)
    made = Random(rng.random())

    def draw(seeds: list[int], prune: Any) -> Tensor:
        pictures = torch.stack([_drawn(made) for _ in seeds])
        return pictures if prune is None else pictures[prune.chosen(pictures[:, :16])]

    return f"the best of several: {list(options)}", lambda _: _kept(best_of(draw, options.pop("seed"), **options))


def _hostile(rng: Random) -> Any:
    """A score that gives something, or another number of things."""
    given = rng.choice((None, [], [1.0], [0.5] * 4, [float("nan")] * 4, ["1"] * 4, [10**400] * 4, "1234", *NONE))
    return lambda pictures: given


def _kept(selection: Selection) -> Tensor:
    return selection.picture[None]


def _drawn(rng: Random) -> Tensor:
    return torch.rand(SIZE, SIZE, 3, generator=torch.Generator().manual_seed(rng.randrange(2**31)))


def _shape(picture: Any) -> str:
    return f"{type(picture).__name__} {tuple(getattr(picture, 'shape', ()))}"
