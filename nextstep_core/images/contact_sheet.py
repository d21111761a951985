"""Many pictures as one, in rows, each with a line of text under it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..runtime.memory import check_room
from ..sentences import Sentence

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont
    from PIL.ImageFont import ImageFont as BitmapFont

GAP = 8
PAPER, INK = (255, 255, 255), (24, 26, 30)
PIXEL_BYTES = 4 + 2 * 3 * 4  # as it is drawn, and twice as fractions
LARGEST = 256  # letters, in pixels; where pictures are so wide, nobody looks at all of them at once
# Fonts that systems have for letters that Pillow's own lacks, which knows those of western Europe alone.
FONTS = (
    "DejaVuSans.ttf", "segoeui.ttf", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "msyh.ttc", "YuGothM.ttc",
    "malgun.ttf", "PingFang.ttc", "AppleSDGothicNeo.ttc", "wqy-microhei.ttc", "NotoSans-Regular.ttf",
)  # fmt: skip
LETTER = 20  # letters of the usual width that fit beside each other on a picture, at least


def contact_sheet(pictures: Sequence[Tensor], labels: Sequence[str], columns: int) -> Tensor:
    """One picture (1, H, W, 3) of several (h, w, 3), all in [0, 1], row by row; each in the middle of its cell.

    Cells are as large as the largest picture and the longest label. Where all are without a label there are no lines.
    NextStepError for a sheet that does not fit into memory: one wide picture and one tall one make it large.
    """
    from PIL import Image, ImageDraw

    height, width = (max(picture.shape[side] for picture in pictures) for side in (0, 1))
    letters = min(max(12, width // LETTER), LARGEST)
    labels = [" ".join(label.split()) for label in labels]  # in one line
    known = _fonts(letters)
    fonts = {label: _fitting(known, label) for label in labels}
    line = round(1.6 * letters) if any(labels) else 0
    width = max([width, *(round(fonts[label].getlength(label)) for label in labels)])
    columns = max(1, min(columns, len(pictures)))
    rows = -(-len(pictures) // columns)
    size = columns * (width + GAP) + GAP, rows * (height + line + GAP) + GAP
    what = Sentence("A grid of {width}x{height} pixels", width=size[0], height=size[1])
    check_room(size[0] * size[1] * PIXEL_BYTES, what)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for n, picture in enumerate(pictures):
        left, top = GAP + n % columns * (width + GAP), GAP + n // columns * (height + line + GAP)
        pixels = Image.fromarray((picture * 255).round().byte().cpu().numpy())
        sheet.paste(pixels, (left + (width - pixels.width) // 2, top + (height - pixels.height) // 2))
        if n < len(labels):
            pen.text((left + width // 2, top + height + line // 2), labels[n], INK, fonts[labels[n]], anchor="mm")
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]


def _fonts(letters: int) -> list[FreeTypeFont | BitmapFont]:
    """Pillow's own font first, then those of FONTS that this system has."""
    from PIL import ImageFont

    found: list[FreeTypeFont | BitmapFont] = [ImageFont.load_default(letters)]
    for name in FONTS:
        with suppress(OSError):  # not on this system
            found.append(ImageFont.truetype(name, letters))
    return found


def _fitting(fonts: Sequence[FreeTypeFont | BitmapFont], text: str) -> FreeTypeFont | BitmapFont:
    """The first of the fonts that lacks the fewest letters of a text."""

    def lacking(font: FreeTypeFont | BitmapFont) -> int:
        unknown = bytes(font.getmask("\U0010ffff"))  # what is drawn in the place of a letter that is not there
        return sum(bytes(font.getmask(letter)) == unknown for letter in set(text) if not letter.isspace())

    return min(fonts, key=lacking)
