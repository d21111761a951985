"""Pictures that are good enough: drawn again until one is, or chosen among several that are drawn together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..decoding.pruning import DRAWN, Pruning
from ..errors import NextStepError, shown
from ..ranges import Range
from ..sampling.settings import SEED
from .quality import measure_quality

THRESHOLD = Range("threshold", 0.0, 1.0)
ATTEMPTS = Range("attempts", 1, 100)
CANDIDATES = Range("candidates", 1, 64)
KEPT = Range("The share of the candidates that goes on", 0.01, 1.0)

# Pictures (B, H, W, 3) in [0, 1], whole ones or their upper parts, to a number for each; more is better.
Score: TypeAlias = Callable[[Tensor], Sequence[float]]

_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that no seed comes twice; the golden ratio's, so that they lie far apart


def total_quality(pictures: Tensor) -> list[float]:
    """The weighted quality scores; a Score."""
    return [measure_quality(picture).total for picture in pictures]


def agreement(pictures: Tensor) -> list[float]:
    """How like the others each picture is in its colors, 0 to 1; a Score, for three pictures or more.

    What most attempts at one prompt have in common is more often what was asked for. It is the share of colors, in
    64 cells, that a picture has in common with one of them, itself too, on an average.
    """
    cells = (pictures.float().clamp(0, 1) * (CELLS - 1e-3)).long() @ torch.tensor([CELLS**2, CELLS, 1])
    shares = torch.stack([picture.flatten().bincount(minlength=CELLS**3) / picture.numel() for picture in cells])
    alike = 1 - torch.cdist(shares[None], shares[None], p=1)[0] / 2
    return [float(value) for value in alike.mean(1)]


CELLS = 4  # levels of a channel


def seed_of(seed: int, attempt: int) -> int:
    """The seed of an attempt, from 0 on: the first is `seed` itself, and the same follow whenever it is asked."""
    return (SEED.check(seed) + attempt * _SEED_STEP) % (SEED.maximum + 1)


@dataclass(frozen=True)
class Candidate:
    """A picture that was drawn, or begun: its seed, its score, and that of its beginning where one was asked for. One
    that was dropped on the way has no score."""

    seed: int
    score: float | None
    preview_score: float | None = None


@dataclass(frozen=True)
class Selection:
    """The picture (H, W, 3) that was kept, and all that were drawn for it in their order. `passed` says whether it
    reaches what was asked for."""

    picture: Tensor
    candidates: tuple[Candidate, ...]
    chosen: int
    passed: bool = True

    @property
    def kept(self) -> Candidate:
        """The one that was kept."""
        return self.candidates[self.chosen]

    @property
    def rejected(self) -> tuple[Candidate, ...]:
        """The others."""
        return tuple(one for n, one in enumerate(self.candidates) if n != self.chosen)


def quality_gate(
    draw: Callable[[int], Tensor],
    seed: int = 0,
    *,
    threshold: float = 0.5,
    attempts: int = 4,
    score: Score = total_quality,
) -> Selection:
    """Draw with one seed after another until a picture's score reaches `threshold`; after so many attempts, the best.

    `draw` takes a seed and returns a picture (H, W, 3) in [0, 1].
    """
    threshold = THRESHOLD.check(threshold)
    tried: list[Candidate] = []
    best: Tensor | None = None
    chosen = 0
    for attempt in range(ATTEMPTS.check(attempts)):
        picture, its_seed = draw(seed_of(seed, attempt)), seed_of(seed, attempt)
        (value,) = _scores(score, picture[None])
        tried.append(Candidate(its_seed, value))
        if best is None or value > _number(tried[chosen].score):
            best, chosen = picture, attempt
        if value >= threshold:
            break
    assert best is not None, "there is one attempt at least"
    return Selection(best, tuple(tried), chosen, _number(tried[chosen].score) >= threshold)


def best_of(
    draw: Callable[[list[int], Pruning | None], Tensor],
    seed: int = 0,
    *,
    candidates: int = 4,
    score: Score = agreement,
    preview_score: Score | None = None,
    drawn: float = 1 / 3,
    kept: float = 0.5,
) -> Selection:
    """Draw so many candidates together, each with a seed of its own, and keep the one that scores best.

    When about the share `drawn` of their rows is there, they are scored by `preview_score` (None: `score`) on what
    there is, and the best go on, a share of `kept` and one at least; the others leave the batch. With `drawn` or `kept`
    1, all go on. `draw` takes seeds and what is to be dropped, and returns the pictures that came through, as a
    pipeline does: `lambda seeds, prune: pipeline.generate([text] * len(seeds), seed=seeds, prune=prune).images`.
    """
    count = CANDIDATES.check(candidates)
    survivors, drawn = max(1, math.ceil(count * KEPT.check(kept))), DRAWN.check(drawn)
    seeds = [seed_of(seed, n) for n in range(count)]
    began: list[float | None] = [None] * count
    going: list[int] = list(range(count))

    def choose(pictures: Tensor) -> list[int]:
        began[:] = _scores(preview_score or score, pictures)
        going[:] = sorted(sorted(going, key=lambda n: -_number(began[n]))[:survivors])
        return going

    prune = Pruning(drawn, choose) if survivors < count and drawn < 1 else None
    images = draw(seeds, prune)
    scores: list[float | None] = [None] * count
    for n, value in zip(going, _scores(score, images), strict=True):
        scores[n] = value
    every = tuple(Candidate(*of) for of in zip(seeds, scores, began, strict=True))
    chosen = max(going, key=lambda n: _number(scores[n]))
    return Selection(images[going.index(chosen)], every, chosen)


def _scores(score: Score, pictures: Tensor) -> list[float]:
    """A number for each picture; NextStepError when a score of the user's gives something else."""
    given = score(pictures)
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError, OverflowError):
        raise NextStepError(f"The score gave {shown(given)}; it must give a number for each picture.") from None
    if len(values) != len(pictures):
        raise NextStepError(f"The score gave {len(values)} numbers for {len(pictures)} picture(s). Give one for each.")
    if not all(map(math.isfinite, values)):
        raise NextStepError("The score gave NaN or infinity; it must give a number for each picture.")
    return values


def _number(score: float | None) -> float:
    return -math.inf if score is None else score
