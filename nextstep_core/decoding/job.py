"""What is to be drawn in one call: prompts laid out, noise started, settings and size checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import chain

import torch
from torch import Tensor

from ..images.latents import Grid
from ..ranges import Range
from ..request.layout import PromptRows
from ..sampling.noise import NoiseStream
from ..sampling.settings import GenerationSettings
from ..sentences import Sentence

BATCH_SIZE = Range("batch_size", 1, 64)  # of a canvas; prompts and latents from elsewhere may make larger batches
PICTURES = Range(Sentence("The number of pictures in one call"), 1, 4096)


@dataclass(frozen=True)
class KnownTokens:
    """Tokens that are fed instead of sampled: tokens (M, total, token_dim) and keep (total,) bool, True where known.

    `token_by_token` feeds them as an uninterrupted run would have, which repeats its arithmetic to the last bit;
    otherwise a stretch of known tokens goes through the transformer at once, which is much faster.
    """

    tokens: Tensor
    keep: Tensor
    token_by_token: bool = False

    def fill(self, buffer: Tensor) -> None:
        """Put the known tokens into their places of buffer (M, total, token_dim)."""
        keep = self.keep.to(buffer.device)
        buffer[:, keep] = self.tokens.to(buffer)[:, keep]


def picked(tokens: Tensor, pictures: Sequence[int]) -> Tensor:
    """The tokens of these pictures; on their own device also where they are asked by numbers of the host."""
    return tokens.index_select(0, torch.tensor(pictures, device=tokens.device))


@dataclass(frozen=True)
class Job:
    """One call's worth of pictures, checked and laid out, ready to decode: all places of them, or the `first` alone."""

    rows: PromptRows
    grid: Grid
    settings: GenerationSettings
    noise: NoiseStream
    known: KnownTokens | None = None
    first: int | None = None

    @property
    def pictures(self) -> int:
        """How many pictures the job draws."""
        return self.rows.pictures

    @property
    def total(self) -> int:
        """Token places of one picture."""
        return self.grid[0] * self.grid[1]

    @property
    def length(self) -> int:
        """Positions that the KV cache holds; the last token is never fed."""
        return self.rows.ids.shape[1] + self.total - 1

    @property
    def longest_stretch(self) -> int:
        """The most positions that are known at once: those of the prompt, or all where tokens are known beforehand."""
        return self.rows.ids.shape[1] if self.known is None else self.length

    @property
    def batch(self) -> int:
        """Rows of the transformer's batch, all branches counted."""
        return self.rows.ids.shape[0]

    def part(self, pictures: Sequence[int]) -> Job:
        """These pictures alone, with the prompts and the noise that they have in the whole job."""
        known = self.known and replace(self.known, tokens=picked(self.known.tokens, pictures))
        return replace(self, rows=self.rows.part(pictures), noise=self.noise.part(pictures), known=known)

    def begun(self, places: int) -> Job:
        """The first places of every picture alone; the others stay zero."""
        return replace(self, first=places)

    def after(self, tokens: Tensor, places: int) -> Job:
        """The rest of the job, given tokens (pictures, total, token_dim) whose first `places` are drawn."""
        keep = torch.arange(self.total) < places
        if self.known is not None:
            keep |= self.known.keep.cpu()
        return replace(self, known=KnownTokens(tokens, keep), first=None)

    def prompt_key(self, dtype: torch.dtype) -> str:
        """Tells prompts apart by what the transformer reads: ids, padding, input images and dtype."""
        digest = sha256(f"{dtype} {tuple(self.rows.ids.shape)}".encode())
        digest.update(self.rows.ids.numpy().tobytes() + self.rows.valid.numpy().tobytes())
        for image in chain.from_iterable(self.rows.images):
            digest.update(image.tokens.float().cpu().numpy().tobytes())
        return digest.hexdigest()
