"""How a picture came about, as frames: its tokens appear one after another, in the order in which they were drawn.

A token never changes once it is drawn, so the finished picture holds every step of its own making, and nothing has to
be recorded while it is drawn. The picture is decoded once; what a frame shows does not flicker from frame to frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ranges import Range
from ..runtime.memory import check_room
from ..sentences import Sentence
from .preview import BACKGROUND, side_by_side

FRAMES, HOLD = Range("frames", 2, 120), Range("hold", 0, 60)
LONGEST_SIDE = Range("longest_side", 64, 1024)  # in pixels
EVEN = 2  # video formats take even sides only


def drawing_frames(
    pictures: Tensor,
    drawn: Tensor,
    blank: Tensor,
    frames: int,
    hold: int,
    longest_side: int,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """(frames + hold, h, w, 3) in [0, 1]: how pictures (B, H, W, 3) filled, a batch side by side.

    `drawn` (rows, columns) is True where a token was drawn in this run (the others were there before it), and `blank`
    (B, rows, columns) where it is still to be drawn. The last frame is the whole picture, and is shown `hold` times
    more. Sides are at most `longest_side` long. `check` is called before each frame, to end it by raising.
    """
    count, height, width = pictures.shape[:3]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = min(1.0, longest_side / max(rows * height, columns * width))
    size = [max(EVEN, int(side * scale) // EVEN * EVEN) for side in (height, width)]
    needed = (frames + hold) * rows * columns * size[0] * size[1] * 3 * torch.float32.itemsize
    what = Sentence(
        "{count} frames of {width}x{height} pixels", count=frames + hold, width=columns * size[1], height=rows * size[0]
    )
    check_room(2 * needed, what)
    small = pictures.float().movedim(-1, 1)
    if size != [height, width]:
        small = F.interpolate(small, size=size, mode="bilinear", antialias=True)
    arrives = drawn & ~blank.all(0)
    nth = arrives.flatten().cumsum(0).reshape(drawn.shape)
    total, shots = int(arrives.sum()), []
    for n in range(1, frames + 1):
        check()
        hidden = blank | (drawn & (nth > math.ceil(n * total / frames)))
        gray = F.interpolate(hidden.float()[:, None], size=size, mode="nearest-exact") > 0
        shots.append(side_by_side(torch.where(gray, BACKGROUND, small).clamp(0, 1).movedim(1, -1)))
    return torch.stack(shots + shots[-1:] * hold)
