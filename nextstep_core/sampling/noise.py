"""All noise of a generation, from one CPU generator, in the reference's order.

Drawing on the CPU makes one seed give one picture on every device. The order: once for the posterior of encoded input
images, then for each token its initial noise and one more per stochastic step. Each is (images_per_caption,
token_dim) float32, shared by the captions of a call: the k-th image of every caption sees the same noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .settings import SEED


class NoiseStream:
    """The seeded stream of one call; NextStepError for a seed that is none."""

    def __init__(self, seed: int, captions: int, images_per_caption: int, token_dim: int) -> None:
        self.generator = torch.Generator("cpu").manual_seed(SEED.check(seed))
        self.captions = captions
        self.shape = (images_per_caption, token_dim)
        self.pictures = slice(None)

    def part(self, start: int, stop: int) -> NoiseStream:
        """The stream from here on as pictures start..stop-1 see it; this one stays where it is."""
        stream = NoiseStream(0, self.captions, *self.shape)
        stream.generator.set_state(self.generator.get_state())
        stream.pictures = slice(start, stop)
        return stream

    def for_posterior(self, channels: int, height: int, width: int) -> Tensor:
        """Noise (1, channels, height, width) for one encoded image's posterior, in the order of the batch's rows.

        Draw it even where its value is unused: it moves the stream.
        """
        return torch.randn(1, channels, height, width, generator=self.generator)

    def for_token(self, count: int) -> Tensor:
        """Every noise of one image token, (count, captions * images_per_caption, token_dim)."""
        noise = torch.stack([torch.randn(self.shape, generator=self.generator) for _ in range(count)])
        return noise.repeat(1, self.captions, 1)[:, self.pictures]
