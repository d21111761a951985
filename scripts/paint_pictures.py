"""The pictures that the templates load: a lighthouse at dusk, painted with formulas.

`python -m scripts.paint_pictures` writes them into `example_pictures/`. The one for inpainting carries its mask in its
alpha channel, over the sea, where the template draws a boat.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

FOLDER = Path(__file__).resolve().parent.parent / "example_pictures"
WIDTH, HEIGHT = 768, 512
SEA, TOWER = 318, (560, 96, 300)  # the horizon; the tower's middle, top and foot
BOAT = (96, 232, 288, 376)  # the box that is to be inpainted

Array = np.ndarray


def blend(stops: dict[float, tuple[int, int, int]], place: Array) -> Array:
    """Colors (..., 3) at places, between the stops on both sides of each."""
    keys = sorted(stops)
    return np.stack([np.interp(place, keys, [stops[key][band] for key in keys]) for band in range(3)], -1)


def noise(draw: np.random.Generator, columns: int, rows: int) -> Array:
    """Soft noise (HEIGHT, WIDTH) in [0, 1], in cells of a grid and of two finer ones."""
    total = np.zeros((HEIGHT, WIDTH))
    for octave in range(3):
        cells = draw.random((rows * 2**octave, columns * 2**octave)).astype(np.float32)
        grown = Image.fromarray(cells).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        total += np.asarray(grown) / 2 ** (octave + 1)
    return np.clip(total, 0, 1)


def over(below: Array, color: Array | tuple[int, int, int], share: Array) -> Array:
    return below + share[..., None] * (np.asarray(color, dtype=float) - below)


def shape(*polygons: list[tuple[float, float]], soft: float = 0.8) -> Array:
    """Polygons as a share (HEIGHT, WIDTH) with smooth edges."""
    large = Image.new("L", (WIDTH * 3, HEIGHT * 3))
    for polygon in polygons:
        ImageDraw.Draw(large).polygon([(3 * x, 3 * y) for x, y in polygon], fill=255)
    small = large.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(soft))
    return np.asarray(small, dtype=float) / 255


def glow(x: float, y: float, across: float, down: float) -> Array:
    columns, rows = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    return np.exp(-(((columns - x) / across) ** 2) - ((rows - y) / down) ** 2)


def sky_and_sea(draw: np.random.Generator) -> Array:
    rows = np.repeat(np.arange(HEIGHT)[:, None], WIDTH, axis=1).astype(float)
    sky = {0: (38, 52, 98), 130: (92, 88, 140), 230: (214, 130, 120), SEA: (255, 206, 140)}
    sea = {SEA: (214, 150, 128), 350: (96, 100, 140), HEIGHT: (24, 44, 82)}
    picture = blend(sky, rows)
    picture = over(picture, (255, 236, 190), 0.9 * glow(190, SEA, 170, 60))
    clouds = np.clip((noise(draw, 4, 14) - 0.5) * 4, 0, 1) * np.clip((SEA - rows) / 120, 0, 1)
    picture = over(picture, (250, 168, 140), 0.55 * clouds)
    picture = over(picture, (70, 66, 112), 0.5 * np.roll(clouds, -7, axis=0) * np.clip(1 - rows / 260, 0, 1))
    picture = over(picture, (255, 244, 206), shape(ring(190, SEA - 16, 24)))
    waves = np.clip((noise(draw, 10, 90) - 0.45) * 5, 0, 1)
    water = over(blend(sea, rows), (20, 32, 66), 0.35 * waves)
    path = glow(190, SEA, 90, 240) * np.clip((noise(draw, 14, 120) - 0.42) * 6, 0, 1)
    water = over(water, (255, 214, 150), 0.85 * path)
    return np.where((rows >= SEA)[..., None], water, picture)


def ring(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    return [(x + radius * np.cos(a), y + radius * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 60)]


def land(picture: Array, draw: np.random.Generator) -> Array:
    along = np.linspace(0, 1, 80)
    rough = np.convolve(draw.normal(size=90), np.ones(11) / 11, mode="valid")
    edge = [(360 + 408 * t, 470 - 176 * min(1, 2.1 * t) ** 0.7 + 14 * r) for t, r in zip(along, rough)]
    cliff = shape([*edge, (WIDTH, HEIGHT), (330, HEIGHT)])
    rock = over(
        np.full((HEIGHT, WIDTH, 3), (58.0, 48, 62)), (128, 96, 92), np.clip(noise(draw, 30, 14) * 1.6 - 0.5, 0, 1)
    )
    picture = picture + cliff[..., None] * (rock - picture)
    turf = shape([*edge, *((x, y + 18 + 10 * r) for (x, y), r in zip(edge[::-1], rough))])
    picture = over(picture, (92, 104, 62), 0.9 * turf * (0.6 + 0.4 * noise(draw, 60, 60)))
    shore = [(x - 14, y + 22) for x, y in edge[:18]]
    foam = shape([*shore, *((x - 30, y + 12) for x, y in shore[::-1])], soft=5)
    return over(picture, (236, 226, 226), 0.35 * foam)


def lighthouse(picture: Array) -> Array:
    x, top, foot = TOWER
    columns, rows = np.meshgrid(np.arange(WIDTH, dtype=float), np.arange(HEIGHT, dtype=float))
    half = 17 + 13 * (rows - top) / (foot - top)
    tower = shape([(x - 17, top), (x + 17, top), (x + 30, foot), (x - 30, foot)])
    bands = np.where(((rows - top) // 34) % 2 == 0, 1.0, 0.0)[..., None]
    paint = bands * np.array([238.0, 232, 226]) + (1 - bands) * np.array([196.0, 54, 50])
    light = np.clip(0.98 - 0.5 * (columns - x) / half - 0.28 * ((columns - x) / half) ** 2, 0.3, 1.1)
    picture = picture + tower[..., None] * (np.clip(paint * light[..., None], 0, 255) - picture)
    house = shape([(x + 34, foot + 6), (x + 34, foot - 34), (x + 108, foot - 34), (x + 108, foot + 6)])
    picture = over(picture, (206, 190, 180), house)
    picture = over(
        picture,
        (116, 52, 52),
        shape([(x + 28, foot - 34), (x + 48, foot - 62), (x + 96, foot - 62), (x + 114, foot - 34)]),
    )
    panes = [[(x + a, foot - 24), (x + a + 12, foot - 24), (x + a + 12, foot - 8), (x + a, foot - 8)] for a in (48, 80)]
    slits = [[(x - 4, y), (x + 4, y), (x + 4, y + 13), (x - 4, y + 13)] for y in (top + 44, top + 112)]
    picture = over(picture, (255, 214, 128), shape(*panes))
    picture = over(picture, (66, 56, 76), shape(*slits))
    beam = shape([(x, top - 17), (0, top - 86), (0, top + 12)], soft=7) * np.clip(columns / x, 0, 1)
    picture = over(picture, (255, 240, 190), 0.42 * beam)
    picture = over(picture, (50, 46, 62), shape([(x - 24, top), (x + 24, top), (x + 24, top - 6), (x - 24, top - 6)]))
    picture = over(
        picture, (255, 236, 160), shape([(x - 13, top - 6), (x + 13, top - 6), (x + 13, top - 30), (x - 13, top - 30)])
    )
    bars = [
        [(x + a - 1, top - 6), (x + a + 1, top - 6), (x + a + 1, top - 30), (x + a - 1, top - 30)]
        for a in (-13, -5, 5, 13)
    ]
    picture = over(picture, (50, 46, 62), shape(*bars, [(x - 18, top - 29), (x, top - 50), (x + 18, top - 29)]))
    return over(picture, (255, 236, 170), 0.8 * glow(x, top - 18, 34, 30))


def paint() -> Image.Image:
    draw = np.random.default_rng(7)
    picture = lighthouse(land(sky_and_sea(draw), draw))
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    picture = paint()
    picture.save(FOLDER / "nextstep_lighthouse.jpg", quality=90, optimize=True)
    alpha = Image.new("L", picture.size, 255)
    ImageDraw.Draw(alpha).ellipse(BOAT, fill=0)
    few = picture.quantize(256, dither=Image.Dither.NONE).convert("RGB")  # what a small file can hold
    few.putalpha(alpha)
    few.save(FOLDER / "nextstep_inpaint.png", optimize=True)
    for path in sorted(FOLDER.iterdir()):
        print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
