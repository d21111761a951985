"""Where a checkpoint's image tokens live: between pixels, the latents of its VAE, and tokens.

A token is a square patch of latent positions, which are in turn squares of pixels; scale and shift take what the VAE
encodes to what the transformer reads. Nothing else in the engine counts pixels per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from einops import rearrange
from torch import Tensor

from ..errors import NextStepError
from ..model.config import NextStepConfig, VAEConfig
from ..ranges import Range
from ..sentences import named

Grid: TypeAlias = tuple[int, int]  # (rows, columns) of tokens

# In pixels. The least is a token of the published checkpoints; the greatest is far beyond what any was trained for.
WIDTH, HEIGHT = Range("width", 16, 4096), Range("height", 16, 4096)


@dataclass(frozen=True)
class LatentSpace:
    """The latents (B, channels, h, w) of one checkpoint with its VAE, and its tokens (B, rows * columns, D).

    `downscale` is pixels per latent position and `patch` latent positions per token, along a side; the transformer
    reads (latent - shift) * scale.
    """

    channels: int
    patch: int
    downscale: int
    scale: float
    shift: float

    @classmethod
    def from_configs(cls, config: NextStepConfig, vae: VAEConfig | None) -> LatentSpace:
        """The space of a checkpoint with its VAE; without one, that of the published VAE.

        NextStepError when the VAE's latents are not what the model's tokens are made of.
        """
        if vae is None:
            return replace(PUBLISHED_LATENTS, channels=config.latent_channels, patch=config.latent_patch_size)
        if vae.z_channels != config.latent_channels or vae.downscale != PUBLISHED_LATENTS.downscale:
            raise NextStepError(
                "This VAE has {channels} latent channels at 1/{downscale} of the size; the model needs "
                "{wanted_channels} at 1/{wanted_downscale}. Use the VAE that came with the checkpoint.",
                channels=vae.z_channels,
                downscale=vae.downscale,
                wanted_channels=config.latent_channels,
                wanted_downscale=PUBLISHED_LATENTS.downscale,
            )
        return cls(vae.z_channels, config.latent_patch_size, vae.downscale, vae.scaling_factor, vae.shift_factor)

    @property
    def unit(self) -> int:
        """Side of the square of pixels that one token covers."""
        return self.downscale * self.patch

    def check_side(self, side: Range[int], value: int) -> int:
        """Width or height in pixels; NextStepError offers the nearest where it is not whole tokens."""
        value = side.check(value)
        if value % self.unit:
            raise NextStepError(
                "{name} is {value}; use a multiple of {unit}, such as {nearest}.",
                name=named(side.name),
                value=value,
                unit=self.unit,
                nearest=self._nearest(value),
            )
        return value

    def _nearest(self, side: int) -> int:
        return max(self.unit, round(side / self.unit) * self.unit)

    def grid(self, height: int, width: int) -> Grid:
        """(rows, columns) of a picture in pixels; NextStepError offers the nearest size where a side does not fit."""
        unit, width, height = self.unit, WIDTH.check(width), HEIGHT.check(height)
        if width % unit or height % unit:
            raise NextStepError(
                "A picture of {width}x{height} pixels is not possible: width and height must be multiples of "
                "{unit}. The nearest size is {near_width}x{near_height}.",
                width=width,
                height=height,
                unit=unit,
                near_width=self._nearest(width),
                near_height=self._nearest(height),
            )
        return height // unit, width // unit

    def grid_of(self, latents: Tensor) -> Grid:
        """(rows, columns) of latents (B, channels, h, w), as `grid`; NextStepError for another number of channels."""
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise NextStepError(
                "The latent has the shape {shape}; this model draws (batch, {channels}, height / {downscale}, "
                "width / {downscale}). Use NextStep Empty Latent.",
                shape=tuple(latents.shape),
                channels=self.channels,
                downscale=self.downscale,
            )
        return self.grid(latents.shape[-2] * self.downscale, latents.shape[-1] * self.downscale)

    def size(self, grid: Grid) -> tuple[int, int]:
        """(width, height) in pixels of a (rows, columns) grid."""
        return grid[1] * self.unit, grid[0] * self.unit

    def size_inside(self, width: int, height: int) -> tuple[int, int]:
        """The largest (width, height) of whole tokens that fits inside a picture; at least one token each way."""
        return max(self.unit, width // self.unit * self.unit), max(self.unit, height // self.unit * self.unit)

    def shape(self, grid: Grid) -> tuple[int, int, int]:
        """(channels, h, w) of the latents of a (rows, columns) grid."""
        return self.channels, grid[0] * self.patch, grid[1] * self.patch

    def to_tokens(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the VAE encodes them, to tokens (B, N, D) as the transformer reads them."""
        return self.cut((latents - self.shift) * self.scale)

    def to_latents(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Inverse of `to_tokens`: tokens (B, N, D) of a (rows, columns) grid, to what the VAE decodes."""
        return self.join(tokens, grid) / self.scale + self.shift

    def cut(self, values: Tensor) -> Tensor:
        """(B, C, h, w) to (B, rows * columns, C * patch * patch) in raster order, values as they are."""
        return rearrange(values, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)

    def join(self, tokens: Tensor, grid: Grid) -> Tensor:
        """Inverse of `cut` for a (rows, columns) grid of any shape."""
        h, w = grid
        return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=self.patch, q=self.patch)


# The space of the published checkpoints, whose VAE normalizes its latents itself.
PUBLISHED_LATENTS = LatentSpace(channels=16, patch=2, downscale=8, scale=1.0, shift=0.0)
