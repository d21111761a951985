"""Where a part of a picture lies on the canvas that is drawn, and the way back into the picture.

Sizes are (width, height) and boxes (left, top, right, bottom), in pixels. A mask is 1 where a picture is drawn anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import NextStepError, check_choice

Size: TypeAlias = tuple[int, int]
Box: TypeAlias = tuple[int, int, int, int]

CROP, PAD, RESIZE = "crop", "pad", "resize"
FILL = 0.5  # gray, as the host's own padding node has it


@dataclass(frozen=True)
class Placement:
    """The part `box` of a picture of size `original`, scaled to the part `area` of a canvas of size `canvas`."""

    original: Size
    box: Box
    canvas: Size
    area: Box

    @classmethod
    def fit(cls, original: Size, box: Box, canvas: Size, mode: str) -> Placement:
        """Bring `box` onto a canvas: cut what goes over (crop), leave room around (pad), or stretch (resize)."""
        check_choice("mode", mode, (CROP, PAD, RESIZE))
        whole = 0, 0, *canvas
        if mode == CROP:
            return cls(original, _inside(box, _shrunk(size_of(box), canvas)), canvas, whole)
        if mode == PAD:
            return cls(original, box, canvas, _inside(whole, _shrunk(canvas, size_of(box))))
        return cls(original, box, canvas, whole)

    @classmethod
    def keep(cls, original: Size, box: Box, canvas: Size) -> Placement:
        """The middle of `box` as it is; enlarged only where it is smaller than the canvas."""
        width, height = (min(sides) for sides in zip(size_of(box), canvas))
        return cls(original, _inside(box, (width, height)), canvas, (0, 0, *canvas))

    def take(self, pictures: Tensor) -> Tensor:
        """Pictures (B, H, W, 3) in [0, 1] on their canvases (B, h, w, 3), gray where there is nothing of them."""
        part = _resized(_cut(pictures.movedim(-1, 1), self.box), size_of(self.area))
        return F.pad(part, self._around(), value=FILL).movedim(1, -1)

    def take_mask(self, mask: Tensor) -> Tensor:
        """A mask (B, H, W) on the canvas (B, h, w): what was thin stays, and the room around is drawn."""
        width, height = size_of(self.area)
        part = F.adaptive_max_pool2d(_cut(mask, self.box), (height, width))
        return F.pad(part, self._around(), value=1.0)

    def put_back(self, pictures: Tensor, drawn: Tensor, mask: Tensor | None, feather: int) -> Tensor:
        """Pictures (B, H, W, 3) with what was drawn (B, h, w, 3) in its place; both in [0, 1].

        `mask` (B, h, w) says where on the canvas; None is everywhere. What is masked is replaced, and within `feather`
        pixels of the canvas around it the picture comes through again. `drawn` may have been enlarged. NextStepError
        when it has other proportions than the canvas.
        """
        width, height = drawn.shape[2], drawn.shape[1]
        grown = width / self.canvas[0]
        area = tuple(round(side * grown) for side in self.area)
        other = abs(width * self.canvas[1] - height * self.canvas[0]) > max(*self.canvas, width, height)
        if other or not all(_cut(drawn.movedim(-1, 1), area).shape[-2:]):
            raise NextStepError(
                "The drawn picture is {width}x{height}, but {wanted_width}x{wanted_height} was prepared. Connect "
                "the picture that was drawn from the prepared one.",
                width=width,
                height=height,
                wanted_width=self.canvas[0],
                wanted_height=self.canvas[1],
            )
        left, top, right, bottom = self.box
        new = _resized(_cut(drawn.movedim(-1, 1), area), size_of(self.box))
        share = _cut(drawn.new_ones(1, *self.canvas[::-1]) if mask is None else mask, self.area)
        share = _resized(self._faded(share, feather)[:, None], size_of(self.box)).to(new)
        out = pictures.movedim(-1, 1).clone()
        old = out[:, :, top:bottom, left:right]
        out[:, :, top:bottom, left:right] = old + share * (new - old)
        return out.movedim(1, -1)

    def _around(self) -> Box:
        """The room on the canvas (left, right, top, bottom), as torch pads."""
        left, top, right, bottom = self.area
        return left, self.canvas[0] - right, top, self.canvas[1] - bottom

    def _faded(self, mask: Tensor, feather: int) -> Tensor:
        """The share (B, h, w) of what was drawn: 1 on the mask, falling to 0 over `feather` pixels around it, and
        falling to 0 towards the sides where the picture goes on beyond the box."""
        reach = feather // 2
        share = F.max_pool2d(mask, 2 * reach + 1, 1, reach)
        share = _blurred(F.pad(share[:, None], (reach,) * 4, mode="replicate"), reach)[:, 0]
        left, top, right, bottom = (side != end for side, end in zip(self.box, (0, 0, *self.original)))
        height, width = share.shape[-2:]
        return (
            share
            * _ramp(height, feather, top, bottom)[:, None].to(share)
            * _ramp(width, feather, left, right).to(share)
        )


def size_of(box: Box) -> Size:
    """(width, height) of a box."""
    return box[2] - box[0], box[3] - box[1]


def around(mask: Tensor, margin: int, proportion: float | None = None) -> Box | None:
    """The box of what is masked in any of (B, H, W), with a margin; None when nothing is.

    It is grown to the proportion (width over height), but not beyond the picture.
    """
    rows, columns = (torch.where((mask > 0.5).any(0).any(side))[0].tolist() for side in (1, 0))
    if not rows:
        return None
    height, width = mask.shape[-2:]
    sides = columns[-1] + 1 - columns[0] + 2 * margin, rows[-1] + 1 - rows[0] + 2 * margin
    if proportion is not None:
        sides = max(sides[0], round(sides[1] * proportion)), max(sides[1], round(sides[0] / proportion))
    spans = []
    for side, first, last, whole in zip(sides, (columns[0], rows[0]), (columns[-1], rows[-1]), (width, height)):
        side = min(side, whole)
        start = min(max(0, (first + last + 1 - side) // 2), whole - side)
        spans.append((start, start + side))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def _shrunk(size: Size, proportions: Size) -> Size:
    """The largest size of these proportions that fits into `size`."""
    scale = min(size[0] / proportions[0], size[1] / proportions[1])
    width, height = (max(1, min(side, round(part * scale))) for side, part in zip(size, proportions))
    return width, height


def _inside(box: Box, size: Size) -> Box:
    """A box of this size in the middle of another."""
    left = box[0] + (box[2] - box[0] - size[0]) // 2
    top = box[1] + (box[3] - box[1] - size[1]) // 2
    return left, top, left + size[0], top + size[1]


def _cut(values: Tensor, box: Box | tuple[int, ...]) -> Tensor:
    """The part of (..., H, W) that lies in a box."""
    left, top, right, bottom = box
    return values[..., top:bottom, left:right]


def _resized(values: Tensor, size: Size) -> Tensor:
    """(B, C, H, W) in [0, 1] resized to a size; as it is where that is its own."""
    width, height = size
    if values.shape[-2:] == (height, width):
        return values
    return F.interpolate(values, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)


def _ramp(length: int, reach: int, at_start: bool, at_end: bool) -> Tensor:
    """(length,) of ones that rise from 0 over `reach` places where they are to."""
    away = torch.arange(length) + 0.5
    rises = [away / max(reach, 0.5)] * at_start + [away.flip(0) / max(reach, 0.5)] * at_end
    return torch.stack([torch.ones(length), *rises]).amin(0)


def _blurred(values: Tensor, reach: int) -> Tensor:
    """The mean of the square around each place of (B, C, H, W), without the `reach` outermost places."""
    return F.avg_pool2d(values, 2 * reach + 1, 1)
