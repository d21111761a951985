"""The picture world of the tiny checkpoint: scenes of flat shapes, their exact captions, edits and renderer.

Everything here is a plain value: a `Scene` says what is in the picture, `render` draws it, `caption` names it, and
an `Edit` is two scenes and the sentence between them. Nothing here knows of models or training.
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (0xE0, 0x20, 0x20),
    "green": (0x20, 0xA0, 0x40),
    "blue": (0x20, 0x50, 0xE0),
    "yellow": (0xF0, 0xD0, 0x20),
    "orange": (0xF0, 0x80, 0x20),
    "purple": (0x80, 0x30, 0xC0),
    "black": (0x10, 0x10, 0x10),
    "white": (0xF5, 0xF5, 0xF5),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond")
RADII = {"small": 14, "large": 22}  # pixels, of the circle around the shape
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SQUARE = (64, 64)
CANVASES = (SQUARE, (96, 64), (64, 96), (128, 64), (64, 128))  # (width, height)
GRID = 8  # object centers lie on multiples of this, within one step of their nominal place
EDIT_KINDS = ("recolor", "background", "replace", "remove")
HELD_OUT_PERCENT = 15
SUPERSAMPLING = 8


@dataclass(frozen=True)
class SceneObject:
    """One flat shape; (x, y) is its center in pixels from the top left corner."""

    shape: str
    color: str
    size: str
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """A background and the objects on it, the first-named object first."""

    background: str
    objects: tuple[SceneObject, ...]
    width: int = 64
    height: int = 64

    @property
    def relation(self) -> str | None:
        """Where the first object lies as seen from the second; None unless there are two."""
        if len(self.objects) != 2:
            return None
        first, second = self.objects
        return relation_between((first.x, first.y), (second.x, second.y))


@dataclass(frozen=True)
class Edit:
    """An instruction and the pictures before and after it."""

    kind: str
    instruction: str
    source: Scene
    target: Scene


def relation_between(first: tuple[float, float], second: tuple[float, float]) -> str:
    """Name where the first (x, y) lies as seen from the second, by the larger of the two distances."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


# --- the held-out split


def is_held_out(color: str, shape: str, background: str) -> bool:
    """Whether this triple never occurs in training, decided by a hash that no code change moves."""
    digest = hashlib.sha256(f"{color} {shape} {background}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def scene_is_held_out(scene: Scene) -> bool:
    """Whether any object of the scene forms a held-out triple with its background."""
    return any(is_held_out(o.color, o.shape, scene.background) for o in scene.objects)


def triples(held_out: bool) -> list[tuple[str, str, str]]:
    """All (color, shape, background) of one side of the split, in a fixed order."""
    return [
        (color, shape, background)
        for color in COLORS
        for shape in SHAPES
        for background in COLORS
        if color != background and is_held_out(color, shape, background) == held_out
    ]


# --- captions


def with_article(words: str) -> str:
    """Put "a" or "an" before words."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def caption(scene: Scene, name_size: bool = False) -> str:
    """The exact sentence for a scene of one or two objects."""
    names = [
        with_article(f"{o.size} {o.color} {o.shape}" if name_size else f"{o.color} {o.shape}") for o in scene.objects
    ]
    ground = f"on {with_article(scene.background)} background"
    if not names:
        return f"{with_article(scene.background)} background"
    if len(names) == 1:
        return f"{names[0]} {ground}"
    return f"{names[0]} {scene.relation} {names[1]} {ground}"


# --- drawing


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Membership of points in the unit-radius shape; y points down."""
    if shape == "circle":
        return x * x + y * y <= 0.95**2
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.82
    if shape == "diamond":
        return abs(x) + abs(y) <= 1.0
    if shape == "triangle":
        # apex on top, base below; the edge falls 1.7 for a half-width of 0.95
        return (y <= 0.8) & (abs(x) <= (y + 0.9) * (0.95 / 1.7))
    if shape == "star":
        return _inside_star(x, y)
    raise ValueError(f"unknown shape {shape!r}; one of {', '.join(SHAPES)}")


def _inside_star(x: np.ndarray, y: np.ndarray, inner: float = 0.42) -> np.ndarray:
    """Five-pointed star, one point up: each tenth of the turn is bounded by one straight edge."""
    tenth = math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + tenth) % (2 * tenth) - tenth)  # 0 at a tip, tenth at a notch
    notch_x, notch_y = inner * math.cos(tenth), inner * math.sin(tenth)
    radius = np.hypot(x, y)
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    return (px - 1.0) * notch_y - py * (notch_x - 1.0) <= 0


@lru_cache(maxsize=4096)
def coverage(shape: str, radius: float, x: float, y: float, width: int, height: int) -> np.ndarray:
    """The share of each pixel that the shape covers, (height, width) float32 in 0..1."""
    step = 1.0 / SUPERSAMPLING
    xs = (np.arange(width * SUPERSAMPLING) + 0.5) * step
    ys = (np.arange(height * SUPERSAMPLING) + 0.5) * step
    covered = inside(shape, (xs[None, :] - x) / radius, (ys[:, None] - y) / radius)
    blocks = covered.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING)
    mask = blocks.mean(axis=(1, 3), dtype=np.float32)
    mask.flags.writeable = False  # cached and shared
    return mask


def render(scene: Scene) -> np.ndarray:
    """Draw a scene, anti-aliased, as (height, width, 3) uint8."""
    image = np.empty((scene.height, scene.width, 3), np.float32)
    image[:] = COLORS[scene.background]
    for o in scene.objects:
        alpha = coverage(o.shape, RADII[o.size], o.x, o.y, scene.width, scene.height)[..., None]
        image = image * (1 - alpha) + np.asarray(COLORS[o.color], np.float32) * alpha
    return np.round(image).astype(np.uint8)


# --- drawing lots


def _near(rng: random.Random, nominal: int) -> int:
    return nominal + GRID * rng.choice((-1, 0, 1))


def place_single(
    rng: random.Random, triple: tuple[str, str, str], size: str | None = None, canvas: tuple[int, int] = SQUARE
) -> Scene:
    """A scene of one object near the middle of the canvas; an unnamed size is drawn by lot."""
    color, shape, background = triple
    width, height = canvas
    size = size or rng.choice(list(RADII))
    thing = SceneObject(shape, color, size, _near(rng, width // 2), _near(rng, height // 2))
    return Scene(background, (thing,), width, height)


def place_pair(
    rng: random.Random, first: tuple[str, str], second: tuple[str, str], background: str, relation: str
) -> Scene:
    """Two small objects, each a (color, shape), side by side in a 64x64 scene as the relation says."""
    across = _near(rng, 32)
    near, far = (16, 48) if relation in ("left of", "above") else (48, 16)
    if relation in ("left of", "right of"):
        places = (near, across), (far, across)
    else:
        places = (across, near), (across, far)
    things = zip((first, second), places, strict=True)
    return Scene(background, tuple(SceneObject(shape, color, "small", *place) for (color, shape), place in things))


def sample_pair(rng: random.Random, held_out: bool = False) -> Scene:
    """Two objects of different colors; a held-out scene has at least one held-out triple."""
    while True:
        background, *colors = rng.sample(list(COLORS), 3)
        shapes = [rng.choice(SHAPES) for _ in colors]
        first, second = zip(colors, shapes, strict=True)
        scene = place_pair(rng, first, second, background, rng.choice(RELATIONS))
        if scene_is_held_out(scene) == held_out:
            return scene


def apply_edit(scene: Scene, kind: str, index: int = 0, word: str | None = None) -> Edit:
    """Edit the object at index, or the background; word is the new color or shape, and is not used to remove."""
    thing = scene.objects[index]

    def with_object(*changed: SceneObject) -> Scene:
        return replace(scene, objects=(*scene.objects[:index], *changed, *scene.objects[index + 1 :]))

    if kind == "recolor":
        return Edit(kind, f"make the {thing.shape} {word}", scene, with_object(replace(thing, color=word)))
    if kind == "background":
        return Edit(kind, f"make the background {word}", scene, replace(scene, background=word))
    if kind == "replace":
        instruction = f"replace the {thing.shape} with {with_article(word)}"
        return Edit(kind, instruction, scene, with_object(replace(thing, shape=word)))
    if kind == "remove":
        return Edit(kind, f"remove the {thing.shape}", scene, with_object())
    raise ValueError(f"unknown edit {kind!r}; one of {', '.join(EDIT_KINDS)}")


def edit_scene(rng: random.Random, scene: Scene, kind: str) -> Edit:
    """An edit of this kind that changes something and leaves no two objects of one color."""
    word = None
    if kind in ("recolor", "background"):
        word = rng.choice([c for c in COLORS if c != scene.background and all(c != o.color for o in scene.objects)])
    elif kind == "replace":
        word = rng.choice([s for s in SHAPES if all(s != o.shape for o in scene.objects)])
    return apply_edit(scene, kind, rng.randrange(len(scene.objects)), word)


def sample_edit(
    rng: random.Random, kind: str, held_out: bool = False, canvas: tuple[int, int] = SQUARE, pair: bool = False
) -> Edit:
    """An edit of one object, or of one of two; held out if its target is (for a removal, its source), else neither is.

    Of two objects the instruction names one by its shape, so their shapes differ.
    """
    while True:
        if pair:
            scene = sample_pair(rng, held_out and rng.random() < 0.5)
            if scene.objects[0].shape == scene.objects[1].shape:
                continue
        else:
            color, background = rng.sample(list(COLORS), 2)
            scene = place_single(rng, (color, rng.choice(SHAPES), background), canvas=canvas)
        edit = edit_scene(rng, scene, kind)
        source_out, target_out = scene_is_held_out(edit.source), scene_is_held_out(edit.target)
        if held_out and (source_out if kind == "remove" else target_out):
            return edit
        if not held_out and not source_out and not target_out:
            return edit
