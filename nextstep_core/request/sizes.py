"""The 17 ratios that the model was trained at, and their sizes at a base of 256, 512, 768 or 1024 pixels.

The authors recommend 512 and say that 1024 was not part of the training; of 768 they say nothing.
"""

from __future__ import annotations

from ..errors import NextStepError, check_choice
from ..images.latents import PUBLISHED_LATENTS

BASES = (256, 512, 768, 1024)
MOST_TOKENS = 8192  # the published context: no picture of more can be drawn, and encoding it would take very long
# (columns, rows) of tokens at base 256, from the widest to the tallest.
GRIDS = (
    (32, 8), (28, 9), (25, 10), (23, 11), (21, 12), (19, 13), (18, 14), (17, 15), (16, 16),
    (15, 17), (14, 18), (13, 19), (12, 21), (11, 23), (10, 25), (9, 28), (8, 32),
)  # fmt: skip


def ratio_name(grid: tuple[int, int]) -> str:
    """What a user reads for a grid: "18:14 landscape"."""
    columns, rows = grid
    kind = "square" if columns == rows else "landscape" if columns > rows else "portrait"
    return f"{columns}:{rows} {kind}"


RATIOS = {ratio_name(grid): grid for grid in GRIDS}
# As people say them, for the trained ratio that is nearest to each.
COMMON = ("1:1", "5:4", "4:3", "3:2", "16:9", "2:1", "21:9", "4:5", "3:4", "2:3", "9:16", "1:2", "9:21")
RATIO_NAMES = (*RATIOS, *COMMON)


def grid_of_ratio(name: str) -> tuple[int, int]:
    """(columns, rows) of tokens at base 256 for one of RATIO_NAMES."""
    check_choice("ratio", name, RATIO_NAMES)
    if name in COMMON:
        width, height = name.split(":")
        name = nearest_ratio(int(width), int(height))
    return RATIOS[name]


def ratio_size(ratio: str, base: int) -> tuple[int, int]:
    """(width, height) in pixels of a named ratio at a base; both are whole tokens of the published checkpoints."""
    columns, rows = grid_of_ratio(ratio)
    check_choice("base", base, BASES)
    return PUBLISHED_LATENTS.size((rows * base // BASES[0], columns * base // BASES[0]))


def ratio_size_of_area(ratio: str, area: int) -> tuple[int, int]:
    """(width, height) of a named ratio with about so many pixels; as `ratio_size` where a base has just as many."""
    check_choice("ratio", ratio, RATIOS)
    columns, rows = (max(1, round(side * area**0.5 / BASES[0])) for side in RATIOS[ratio])
    return PUBLISHED_LATENTS.size((rows, columns))


def check_encodable(width: int, height: int) -> None:
    """NextStepError for a picture of so many pixels that encoding it would take hours or more memory than there is."""
    columns, rows = width // PUBLISHED_LATENTS.unit, height // PUBLISHED_LATENTS.unit
    if columns * rows > MOST_TOKENS:
        raise NextStepError(
            "A picture of {width}x{height} is {count:,} tokens; at most {most:,} can be encoded, such as "
            "1440x1440. Make it smaller with NextStep Prepare Picture, to a base of 512 at best.",
            width=width,
            height=height,
            count=columns * rows,
            most=MOST_TOKENS,
        )


def nearest_ratio(width: int, height: int) -> str:
    """The named ratio closest to a picture's proportions."""
    proportion = width / height
    return min(RATIOS, key=lambda name: abs(_stretch(RATIOS[name], proportion)))


def _stretch(grid: tuple[int, int], proportion: float) -> float:
    ratio = grid[0] / grid[1] / proportion
    return max(ratio, 1 / ratio) - 1
