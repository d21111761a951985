"""From a pixel mask to the tokens that are kept: inpainting, outpainting, continuation and resuming are all this."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import NextStepError
from ..images.latents import PUBLISHED_LATENTS, Grid, LatentSpace

THRESHOLD = 0.5


def kept_tokens(mask: Tensor, grid: Grid, latents: LatentSpace = PUBLISHED_LATENTS) -> Tensor:
    """(rows * columns,) bool, True where a token is kept, for a mask (H, W), above 0.5 where the picture is redrawn.

    The mask may be in pixels, latents or any other size of the picture's proportions. A token is redrawn if anything
    in its square is. NextStepError for other proportions, NaN, or a mask that redraws nothing.
    """
    rows, columns = grid
    if mask.ndim != 2 or mask.is_complex() or mask.layout is not torch.strided or mask.device.type == "meta":
        kind = str(mask.dtype).removeprefix("torch.")
        raise NextStepError(
            "A mask has the shape {shape} and {kind} values; expected (height, width).",
            shape=tuple(mask.shape),
            kind=kind,
        )
    mask = mask.float()
    height, width = mask.shape
    if not height or not width or height < rows or width < columns or height * columns != width * rows:
        drawn_width, drawn_height = latents.size(grid)
        raise NextStepError(
            "The mask is {width}x{height}, but the latent is a picture of {wanted_width}x{wanted_height}. "
            "Make the mask from the same picture that was encoded.",
            width=width,
            height=height,
            wanted_width=drawn_width,
            wanted_height=drawn_height,
        )
    if not mask.isfinite().all():
        raise NextStepError("The mask holds NaN or infinite values.")
    redrawn = F.adaptive_max_pool2d((mask > THRESHOLD).float()[None], grid)[0] > 0
    if not redrawn.any():
        raise NextStepError("The mask is empty, so there is nothing to draw. Paint the area that should be redrawn.")
    return ~redrawn.flatten()


def undrawn_tokens(latents: Tensor, space: LatentSpace = PUBLISHED_LATENTS) -> Tensor:
    """(rows, columns) bool, True where a token of any picture of latents (B, C, h, w) was not drawn yet."""
    return blank_tokens(latents, space).any(0)


def blank_tokens(latents: Tensor, space: LatentSpace = PUBLISHED_LATENTS) -> Tensor:
    """(B, rows, columns) bool, True where a token of latents (B, C, h, w) was not drawn yet.

    The tokens of an interrupted run that are still to come are all zero, and no token that was drawn is of one value.
    """
    rows, columns = space.grid_of(latents)
    tokens = space.cut(latents)
    return (tokens.amin(-1) == tokens.amax(-1)).reshape(-1, rows, columns)
