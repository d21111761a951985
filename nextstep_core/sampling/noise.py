"""All noise of a generation, from CPU generators, in the reference's order.

Drawing on the CPU makes one seed give one picture on every device. The order: once for the posterior of encoded input
images, then for each token its initial noise and one more per stochastic step.

With one seed for a call, each of a token's is (images_per_caption, token_dim) float32, shared by the captions: the k-th
image of every caption sees the same noise. With a seed for each picture, every picture has a generator of its own, and
sees what it would see if it were drawn alone with that seed, whatever is drawn beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import islice
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from ..errors import NextStepError
from ..sentences import Sentence
from .settings import SEED

Seeds: TypeAlias = int | Sequence[int]  # one for a whole call, or one for each of its pictures


def check_seeds(seed: Seeds, pictures: int) -> int | list[int]:
    """The seed, or the seeds of so many pictures; NextStepError for such as are none, or for a wrong count."""
    if isinstance(seed, (str, bytes, bytearray)) or not isinstance(seed, Sequence):
        return SEED.check(seed)
    seeds = list(islice(seed, pictures + 1))
    if len(seeds) != pictures:
        held = Sentence("{count}", count=len(seeds))
        if len(seeds) > pictures:
            held = Sentence("more than {count}", count=pictures)
        raise NextStepError(
            "seed holds {held} number(s) for {pictures} picture(s). Give one seed for all of them, or one for each.",
            held=held,
            pictures=pictures,
        )
    return [SEED.check(value) for value in seeds]


class NoiseStream:
    """The seeded noise of one call; NextStepError for seeds that are none, or that are not one for each picture."""

    def __init__(self, seed: Seeds, captions: int, images_per_caption: int, token_dim: int) -> None:
        pictures = range(captions * images_per_caption)
        seeds = check_seeds(seed, len(pictures))
        self.shared = isinstance(seeds, int)
        self.shape = (images_per_caption if self.shared else 1, token_dim)  # that a generator draws at a time
        self.generators = [_generator(value) for value in ([seeds] if isinstance(seeds, int) else seeds)]
        # The row, of all that the generators draw, that each picture sees.
        self.rows = [n % images_per_caption if self.shared else n for n in pictures]

    def part(self, pictures: Sequence[int]) -> NoiseStream:
        """The stream from here on as these pictures see it; this one stays where it is."""
        part, rows = copy(self), [self.rows[n] for n in pictures]
        if self.shared:
            part.generators, part.rows = [_same(self.generators[0])], rows
        else:
            part.generators, part.rows = [_same(self.generators[row]) for row in rows], list(range(len(rows)))
        return part

    def for_posterior(self, picture: int, channels: int, height: int, width: int) -> Tensor:
        """Noise (1, channels, height, width) for one encoded image of a picture, in the order of the batch's rows.

        Draw it even where its value is unused: it moves the stream.
        """
        generator = self.generators[0 if self.shared else self.rows[picture]]
        return torch.randn(1, channels, height, width, generator=generator)

    def for_token(self, count: int) -> Tensor:
        """Every noise of one image token, (count, pictures, token_dim)."""
        drawn = [torch.stack([torch.randn(self.shape, generator=g) for _ in range(count)]) for g in self.generators]
        return torch.cat(drawn, dim=1)[:, self.rows]


def _generator(seed: int) -> Generator:
    return Generator("cpu").manual_seed(seed)


def _same(generator: Generator) -> Generator:
    return Generator("cpu").set_state(generator.get_state())
