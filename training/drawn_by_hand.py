"""Pictures of one object as another program draws them: pillow's ellipses and polygons, without smooth edges.

What a user brings to an edit was not drawn by `scenes.py`. Only the names of colors and shapes, and what a shape's size
means, are the same.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from .scenes import COLORS, EDIT_KINDS, SHAPES, SQUARE, with_article

RADII = (11.0, 18.0)
EDGE = 2.0  # pixels between the object and the canvas's edge


@dataclass(frozen=True)
class Drawing:
    """One object, or none when shape is None, on a background."""

    background: str
    shape: str | None
    color: str
    radius: float
    x: float
    y: float

    def picture(self) -> Image.Image:
        """Draw it, 64x64."""
        image = Image.new("RGB", SQUARE, COLORS[self.background])
        if self.shape is None:
            return image
        pen, color = ImageDraw.Draw(image), COLORS[self.color]
        corners = [(self.x + self.radius * dx - 0.5, self.y + self.radius * dy - 0.5) for dx, dy in outline(self.shape)]
        if self.shape == "circle":
            pen.ellipse(corners, fill=color)
        else:
            pen.polygon(corners, fill=color)
        return image


def outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape of radius 1 around the origin; of a circle, those of the square around it."""
    if shape == "circle":
        return [(-0.95, -0.95), (0.95, 0.95)]
    if shape == "square":
        return [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]
    if shape == "triangle":
        return [(0, -0.9), (0.95, 0.8), (-0.95, 0.8)]
    if shape == "diamond":
        return [(0, -1), (1, 0), (0, 1), (-1, 0)]
    turns = [(math.pi * step / 5, 1 if step % 2 == 0 else 0.42) for step in range(10)]
    return [(length * math.sin(turn), -length * math.cos(turn)) for turn, length in turns]


@dataclass(frozen=True)
class DrawnEdit:
    """An instruction, the picture that it is for, and how the result ought to look."""

    kind: str
    instruction: str
    source: Drawing
    target: Drawing


def sample_drawn_edit(rng: random.Random, kind: str) -> DrawnEdit:
    """An edit of any object, of any size and anywhere."""
    background, color, other = rng.sample(list(COLORS), 3)
    shape, new_shape = rng.sample(SHAPES, 2)
    radius = rng.uniform(*RADII)
    x, y = (rng.uniform(radius + EDGE, side - radius - EDGE) for side in SQUARE)
    source = Drawing(background, shape, color, radius, x, y)
    words = {
        "recolor": (f"make the {shape} {other}", replace(source, color=other)),
        "background": (f"make the background {other}", replace(source, background=other)),
        "replace": (f"replace the {shape} with {with_article(new_shape)}", replace(source, shape=new_shape)),
        "remove": (f"remove the {shape}", replace(source, shape=None)),
        "exchange": (
            f"replace the {shape} with {with_article(f'{other} {new_shape}')}",
            replace(source, color=other, shape=new_shape),
        ),
    }
    return DrawnEdit(kind, words[kind][0], source, words[kind][1])


def sample_drawn_edits(rng: random.Random, count: int) -> list[DrawnEdit]:
    """Edits of every kind in turn."""
    return [sample_drawn_edit(rng, EDIT_KINDS[i % len(EDIT_KINDS)]) for i in range(count)]
