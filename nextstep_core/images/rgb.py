"""Input pictures of any kind to plain RGB of a size that can be encoded."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import REASON, NextStepError, is_out_of_memory, shown

if TYPE_CHECKING:
    from PIL import Image

# One picture: PIL, or an array or tensor (H, W, C) in [0, 1].
ImageInput: TypeAlias = Union["Image.Image", np.ndarray, Tensor]
ORIENTATION, LYING = 0x0112, (5, 6, 7, 8)  # where EXIF says which way up a picture is, and what lays it on its side
SPARE = 4  # times what will be seen of a picture's side is resized at most


def to_rgb(images: Tensor) -> Tensor:
    """(B, H, W, 3) float32 in [0, 1] from (B, H, W, C): gray is repeated, alpha is laid on white.

    NextStepError for what is no picture, empty ones, another number of channels, other kinds of numbers, or NaN.
    """
    if not isinstance(images, Tensor):
        raise NextStepError("An input image is {what}, not a picture.", what=shown(images))
    _check_plain(images)
    if images.ndim != 4 or not images.numel() or images.shape[-1] not in (1, 2, 3, 4):
        raise _no_shape(images)
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
        image = _read(image)
    elif not _is_array(image):
        raise _no_picture(image)
    try:
        pixels = torch.as_tensor(image)
    except (TypeError, ValueError) as error:  # of NumPy's kinds of numbers, PyTorch knows most
        raise NextStepError(
            "An input image of {kind} numbers cannot be read ({reason}).", kind=image.dtype, reason=error
        ) from None
    _check_plain(pixels)
    return to_rgb(pixels[None] if pixels.ndim == 3 else pixels[:1]).movedim(-1, 1) * 2 - 1


def picture_size(image: ImageInput) -> tuple[int, int]:
    """(height, width) of what `to_pixels` takes, before any of it is read: a file of kilobytes can hold gigabytes."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return seen_size(image)[::-1]
    if not _is_array(image):
        raise _no_picture(image)
    if isinstance(image, Tensor):
        _check_plain(image)  # others may have no shape
    height, width = image.shape[-3:-1]
    if not height or not width:
        raise _no_shape(image)
    return height, width


def seen_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of `as_seen`, before any of it is read."""
    # A PNG that does not say so at its start would be read to its end.
    turned = "exif" in image.info and image.getexif().get(ORIENTATION) in LYING
    return (image.height, image.width) if turned else image.size


def as_seen(image: Image.Image) -> Image.Image:
    """A picture as viewers show it: the way up that its file says, RGB or RGBA, in eight bits."""
    from PIL import Image, ImageOps

    if image.mode.startswith("I;16"):  # which PIL turns into white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    has_alpha = "A" in image.getbands() or "transparency" in image.info
    return ImageOps.exif_transpose(image.convert("RGBA" if has_alpha else "RGB"))


def _read(image: Image.Image) -> np.ndarray:
    """A picture as fractions (H, W, 3 or 4); its file is read only now."""
    try:
        return np.asarray(as_seen(image), dtype=np.float32) / 255
    except Exception as error:  # whatever is wrong with whichever kind of file
        if is_out_of_memory(error):
            raise
        raise NextStepError(
            "An input image cannot be read ({reason}). Save it anew as PNG.", reason=str(error)[:REASON]
        ) from None


def _is_array(image: object) -> bool:
    return isinstance(image, (np.ndarray, Tensor)) and image.ndim in (3, 4)


def _no_shape(image: np.ndarray | Tensor) -> NextStepError:
    return NextStepError(
        "An input image has the shape {shape}; expected (batch, height, width, 3).", shape=tuple(image.shape)
    )


def _no_picture(image: object) -> NextStepError:
    return NextStepError(
        "An input image is {what}; expected a picture, or an array of the shape (height, width, 3).", what=shown(image)
    )


def is_plain(values: Tensor) -> bool:
    """Whether a tensor holds numbers that can be computed with: real, all of them, on a device, and of more bits than
    those that only weights are stored in."""
    there = values.layout is torch.strided and values.device.type != "meta" and not values.is_nested
    return there and not (values.is_complex() or values.is_quantized) and not _is_for_storage(values.dtype)


def _is_for_storage(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


def _check_plain(images: Tensor) -> None:
    if not images.is_floating_point() or not is_plain(images):
        kind = images.dtype if images.layout is torch.strided else images.layout
        raise NextStepError("An input image holds {kind} values; expected plain fractions between 0 and 1.", kind=kind)
