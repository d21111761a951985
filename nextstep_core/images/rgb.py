"""Input pictures of any kind to plain RGB of a size that can be encoded."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import NextStepError, shown

if TYPE_CHECKING:
    from PIL import Image

# One picture: PIL, or an array or tensor (H, W, C) in [0, 1].
ImageInput: TypeAlias = Union["Image.Image", np.ndarray, Tensor]
SPARE = 4  # times what will be seen of a picture's side is resized at most


def to_rgb(images: Tensor) -> Tensor:
    """(B, H, W, 3) float32 in [0, 1] from (B, H, W, C): gray is repeated, alpha is laid on white.

    NextStepError for what is no picture, empty ones, another number of channels, other kinds of numbers, or NaN.
    """
    if not isinstance(images, Tensor):
        raise NextStepError(f"An input image is {shown(images)}, not a picture.")
    if images.ndim != 4 or not images.numel() or images.shape[-1] not in (1, 2, 3, 4):
        raise NextStepError(f"An input image has the shape {tuple(images.shape)}; expected (batch, height, width, 3).")
    _check_plain(images)
    images = images.float()
    if not torch.isfinite(images).all():
        raise NextStepError("An input image holds NaN or infinite values.")
    color, alpha = images, None
    if images.shape[-1] in (2, 4):
        color, alpha = images[..., :-1], images[..., -1:]
    if color.shape[-1] == 1:
        color = color.expand(*color.shape[:-1], 3)
    if alpha is not None:
        color = color * alpha + (1 - alpha)
    return color.clamp(0, 1)


def cover(images: Tensor, width: int, height: int) -> Tensor:
    """Resize (B, H, W, 3) until it covers width x height, keeping its proportions, and crop the center."""
    old_height, old_width = images.shape[1:3]
    scale = max(width / old_width, height / old_height)
    # A sliver would be enlarged to a length that no memory holds, only to be cut off: its middle is enough.
    long = min(old_height, ceil(SPARE * height / scale)), min(old_width, ceil(SPARE * width / scale))
    above, before = (old_height - long[0]) // 2, (old_width - long[1]) // 2
    images = images[:, above : above + long[0], before : before + long[1]]
    old_height, old_width = long
    new = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    channels_first = images.movedim(-1, 1)
    if new != (old_height, old_width):
        channels_first = F.interpolate(channels_first, size=new, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (new[0] - height) // 2, (new[1] - width) // 2
    return channels_first[:, :, top : top + height, left : left + width].movedim(1, -1)


def to_pixels(image: ImageInput) -> Tensor:
    """One picture (PIL, or array or tensor (H, W, C) in [0, 1]; alpha is laid on white) to (1, 3, H, W) in [-1, 1]."""
    from PIL import Image

    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGBA" if "A" in image.getbands() else "RGB"), dtype=np.float32) / 255
    if not isinstance(image, (np.ndarray, Tensor)) or image.ndim not in (3, 4):
        raise NextStepError(
            f"An input image is {shown(image)}; expected a picture, or an array of the shape (height, width, 3)."
        )
    try:
        pixels = torch.as_tensor(image)
    except (TypeError, ValueError) as error:  # of NumPy's kinds of numbers, PyTorch knows most
        raise NextStepError(f"An input image of {image.dtype} numbers cannot be read ({error}).") from None
    _check_plain(pixels)
    return to_rgb(pixels[None] if pixels.ndim == 3 else pixels[:1]).movedim(-1, 1) * 2 - 1


def _check_plain(images: Tensor) -> None:
    if not images.is_floating_point() or images.layout is not torch.strided or images.device.type == "meta":
        kind = images.dtype if images.layout is torch.strided else images.layout
        raise NextStepError(f"An input image holds {kind} values; expected plain fractions between 0 and 1.")
