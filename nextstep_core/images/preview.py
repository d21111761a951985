"""A cheap look at unfinished latents: a linear map from latent channels to color, fitted to the VAE at hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

MOSAIC_SIDE = 128
TILE = 16
BACKGROUND = 0.5


def fit_latent_to_rgb(encode: Callable[[Tensor], Tensor]) -> Tensor | None:
    """(C + 1, 3) float32 map from a latent position (and a constant 1) to its color in [0, 1]; None for a VAE that
    encodes to NaN, whose decoder may be well.

    `encode` takes pixels (1, H, W, 3) in [0, 1] and returns latents (1, C, H/8, W/8). It is given one mosaic of random
    flat colors, and the map is the least-squares fit from its latents back to those colors.
    """
    tiles = MOSAIC_SIDE // TILE
    colors = torch.rand(1, 3, tiles, tiles, generator=torch.Generator().manual_seed(0))
    pixels = colors.repeat_interleave(TILE, 2).repeat_interleave(TILE, 3).movedim(1, -1)
    latents = encode(pixels).float().cpu()
    if not latents.isfinite().all():
        return None
    scale = TILE // (MOSAIC_SIDE // latents.shape[-1])
    targets = colors.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    rgb_map: Tensor = torch.linalg.lstsq(_with_constant(latents), targets.movedim(1, -1).reshape(-1, 3)).solution
    return rgb_map


def latents_to_rgb(latents: Tensor, rgb_map: Tensor, finished_rows: Sequence[int]) -> Tensor:
    """Colors (B, h, w, 3) uint8 of latents (B, C, h, w); rows from a picture's `finished_rows` on are gray."""
    batch, _, height, width = latents.shape
    colors = (_with_constant(latents.float().cpu()) @ rgb_map).reshape(batch, height, width, 3).clamp(0, 1)
    for picture, rows in zip(colors, finished_rows, strict=True):
        picture[rows:] = BACKGROUND
    return (colors * 255).round().to(torch.uint8)


def side_by_side(pictures: Tensor) -> Tensor:
    """Pictures (B, h, w, 3), uint8 or in [0, 1], in rows of about as many as there are rows, as one (H, W, 3)."""
    columns = math.ceil(math.sqrt(len(pictures)))
    empty = -len(pictures) % columns
    gray = BACKGROUND if pictures.is_floating_point() else round(BACKGROUND * 255)
    filled = F.pad(pictures, (0, 0) * 3 + (0, empty), value=gray)
    return rearrange(filled, "(r c) h w d -> (r h) (c w) d", c=columns)


def _with_constant(latents: Tensor) -> Tensor:
    flat = latents.movedim(1, -1).reshape(-1, latents.shape[1])
    return torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1)
