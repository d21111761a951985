"""Look at a picture and name what is in it: background, shapes, their colors and sizes, and how they lie.

It sees pixels alone. The shapes' outlines and the palette are the renderer's; everything else (where the background is,
what belongs together, which outline fits best) is found in the picture, so noise and mush get no name.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from training.scenes import COLORS, SHAPES, SIZE_BORDER, Scene, inside, relation_between

NAMES = list(COLORS)
PALETTE = np.array([COLORS[name] for name in NAMES], np.float32)
COLOR_LIMIT = 70.0  # RGB distance beyond which a color has no name
FOREGROUND = 38.0  # RGB distance from the background, just under half of the palette's nearest pair
LEAST_PIXELS = 40  # specks below this are no objects; the smallest shape covers 220
LEAST_MATCH = 0.75  # overlap with the best outline below which a blob has no shape
TURNS = (0.0, -7.0, 7.0)  # degrees; between them every turn of the world fits
SAMPLES = 3


@dataclass(frozen=True)
class SeenObject:
    """One object; shape and color are None where nothing fits. match is the overlap with its outline, 0..1."""

    shape: str | None
    color: str | None
    size: str
    x: float
    y: float
    match: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows; objects from left to right, then from top to bottom."""

    background: str | None
    objects: tuple[SeenObject, ...]

    @property
    def relation(self) -> str | None:
        """Where the first object lies as seen from the second; None unless there are two."""
        if len(self.objects) != 2:
            return None
        first, second = self.objects
        return relation_between((first.x, first.y), (second.x, second.y))


def name_color(color: np.ndarray) -> str | None:
    """The palette's name of an RGB color in 0..255, None when none is near."""
    distances = np.linalg.norm(PALETTE - color, axis=1)
    nearest = int(distances.argmin())
    return NAMES[nearest] if distances[nearest] <= COLOR_LIMIT else None


def read_scene(image: np.ndarray) -> Reading:
    """Read a picture (height, width, 3) uint8."""
    pixels = image.astype(np.float32)
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    ground = np.median(frame, axis=0)
    mask = np.linalg.norm(pixels - ground, axis=2) > FOREGROUND
    objects = [_read_object(pixels, blob, ground) for blob in _blobs(mask)]
    return Reading(name_color(ground), tuple(sorted(objects, key=lambda o: (round(o.x / 12), o.y))))


def _blobs(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask, specks left out, each as a mask of its own."""
    seen, blobs = ~mask, []
    height, width = mask.shape
    for start in zip(*np.nonzero(mask), strict=True):
        if seen[start]:
            continue
        blob, queue = np.zeros_like(mask), deque([start])
        seen[start] = True
        while queue:
            y, x = queue.popleft()
            blob[y, x] = True
            for place in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= place[0] < height and 0 <= place[1] < width and not seen[place]:
                    seen[place] = True
                    queue.append(place)
        if blob.sum() >= LEAST_PIXELS:
            blobs.append(blob)
    return blobs


def _read_object(pixels: np.ndarray, blob: np.ndarray, ground: np.ndarray) -> SeenObject:
    """Name one blob by its inner color and by the outline that covers it best."""
    core = blob.copy()
    for axis, shift in ((0, 1), (0, -1), (1, 1), (1, -1)):
        core &= np.roll(blob, shift, axis)
    color = np.median(pixels[core if core.any() else blob], axis=0)
    towards = color - ground
    cover = np.clip((pixels - ground) @ towards / max(float(towards @ towards), 1.0), 0, 1)
    near = blob.copy()
    for axis, shift in ((0, 1), (0, -1), (1, 1), (1, -1)):
        near |= np.roll(blob, shift, axis)
    cover = np.where(near, cover, 0)
    turns = {shape: TURNS[:1] if shape == "circle" else TURNS for shape in SHAPES}
    match, shape, radius, x, y = max(_fit(cover, shape, turn) for shape in SHAPES for turn in turns[shape])
    size = "small" if radius < SIZE_BORDER else "large"
    return SeenObject(shape if match >= LEAST_MATCH else None, name_color(color), size, x, y, match)


def _fit(cover: np.ndarray, shape: str, turn: float) -> tuple[float, str, float, float, float]:
    """Lay a turned shape of the blob's own area and centroid over it: (overlap, shape, radius, center x, center y)."""
    area = float(cover.sum())
    ys, xs = np.mgrid[: cover.shape[0], : cover.shape[1]] + 0.5
    centroid = float((xs * cover).sum() / area), float((ys * cover).sum() / area)
    unit_area, unit_drop = _unit_moments(shape)
    angle = math.radians(turn)
    best = (0.0, shape, 0.0, 0.0, 0.0)
    for factor in (0.95, 1.0, 1.05):
        radius = factor * (area / unit_area) ** 0.5
        x, y = centroid[0] + math.sin(angle) * unit_drop * radius, centroid[1] - math.cos(angle) * unit_drop * radius
        ideal = _outline(shape, radius, x, y, turn, cover.shape)
        overlap = float(np.minimum(cover, ideal).sum() / np.maximum(cover, ideal).sum())
        best = max(best, (overlap, shape, radius, x, y))
    return best


def _outline(shape: str, radius: float, x: float, y: float, turn: float, size: tuple[int, int]) -> np.ndarray:
    """The share of each pixel that a shape covers, like the renderer's but coarser."""
    ys, xs = ((np.arange(n * SAMPLES) + 0.5) / SAMPLES for n in size)
    dx, dy = (xs[None, :] - x) / radius, (ys[:, None] - y) / radius
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    covered = inside(shape, cos * dx + sin * dy, cos * dy - sin * dx)
    return covered.reshape(size[0], SAMPLES, size[1], SAMPLES).mean(axis=(1, 3))


_MOMENTS: dict[str, tuple[float, float]] = {}


def _unit_moments(shape: str) -> tuple[float, float]:
    """Area of the unit shape, and how far its centroid lies below its center."""
    if shape not in _MOMENTS:
        line = np.linspace(-1.2, 1.2, 601)
        covered = inside(shape, line[None, :], line[:, None])
        _MOMENTS[shape] = float(covered.mean() * 2.4**2), float(np.nonzero(covered)[0].mean() / 600 * 2.4 - 1.2)
    return _MOMENTS[shape]


# --- does a picture show a scene?


def shows_objects(reading: Reading, scene: Scene) -> bool:
    """Whether the picture holds the scene's objects by shape and color, no more and no fewer."""
    seen = sorted((str(o.shape), str(o.color)) for o in reading.objects)
    return seen == sorted((o.shape, o.color) for o in scene.objects)


def shows(reading: Reading, scene: Scene, sizes: bool = False) -> bool:
    """Whether background, objects and relation are right, and with sizes the objects' sizes too."""
    if reading.background != scene.background or not shows_objects(reading, scene):
        return False
    found = [next(o for o in reading.objects if (o.shape, o.color) == (w.shape, w.color)) for w in scene.objects]
    if sizes and any(o.size != w.size for o, w in zip(found, scene.objects, strict=True)):
        return False
    if len(found) == 2:
        return relation_between((found[0].x, found[0].y), (found[1].x, found[1].y)) == scene.relation
    return True
