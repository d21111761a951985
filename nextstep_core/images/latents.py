"""Between latents and tokens."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def patchify(latents: Tensor, patch: int) -> Tensor:
    """(B, C, h * patch, w * patch) latents to (B, h * w, C * patch * patch) tokens in raster order."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Inverse of `patchify` for a (rows, columns) grid of any shape."""
    h, w = grid
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=patch, q=patch)
