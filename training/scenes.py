"""The picture world of the tiny checkpoint: scenes of flat shapes, their exact captions, edits and renderer.

Everything here is a plain value: a `Scene` says what is in the picture, `render` draws it, `caption` names it, and
an `Edit` is two scenes and the sentence between them. Nothing here knows of models or training.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
RADII = {"small": 14, "large": 22}  # pixels, of the circle around the shape, where a size is named
SIZE_BORDER = sum(RADII.values()) / 2
LEAST_RADIUS, MOST_RADIUS, MOST_PAIR_RADIUS = 8.0, 26.0, 15.0
NAMED_APART = 2.0  # a size this near to the border is not named
MARGIN = 1.0  # pixels between a free object and the canvas's edge
GAP = 3.0  # pixels at least between the circles around two objects
MOST_TURN, TURNED_REACH = 10.0, 1.1  # degrees; a turned triangle's corners lie so many radii from the middle's lines
PLAIN_RELATION = 1.3  # how much the larger distance of two objects exceeds the smaller, so that a relation is plain
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SQUARE = (64, 64)
WIDE = ((96, 64), (64, 96), (128, 64), (64, 128))  # (width, height), as all canvases
LARGE = (128, 128)
CANVASES = (SQUARE, *WIDE, LARGE)
GRID = 8  # centers on the grid lie on multiples of this, within one step of their nominal place
EDIT_KINDS = ("recolor", "background", "replace", "remove", "exchange")  # what stays, stays in its place
SIDES = ("left", "right", "top", "bottom", "middle")  # where an object is moved
SIDE_MARGIN = 4.0  # pixels between an object moved to a side and the canvas's edge
LEAST_MOVE = 6.0  # pixels; less is hardly seen
HELD_OUT_PERCENT = 15
SUPERSAMPLING = 8


@dataclass(frozen=True)
class SceneObject:
    """One flat shape; radius is of the circle around it, (x, y) its center in pixels from the top left corner.

    turn is in degrees, clockwise; circles stand upright.
    """

    shape: str
    color: str
    radius: float
    x: float
    y: float
    turn: float = 0.0

    @property
    def reach(self) -> float:
        """How far it reaches from its center, to the sides and up and down, in pixels."""
        return self.radius * TURNED_REACH if self.turn else self.radius

    @property
    def size(self) -> str:
        """The word for the radius."""
        return "small" if self.radius < SIZE_BORDER else "large"

    @property
    def on_grid(self) -> bool:
        """Whether radius and place are among the few that captions without a place mean most often."""
        return self.radius in RADII.values() and self.x % GRID == 0 and self.y % GRID == 0


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


def place_is_held_out(thing: SceneObject) -> bool:
    """Whether no object of training has this radius at this place, in whole pixels; those of the grid are shown."""
    digest = hashlib.sha256(f"{thing.radius:.0f} {thing.x:.0f} {thing.y:.0f}".encode()).digest()
    return not thing.on_grid and int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


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
    """The exact sentence for a scene of at most three objects."""
    names = [
        with_article(f"{o.size} {o.color} {o.shape}" if name_size else f"{o.color} {o.shape}") for o in scene.objects
    ]
    ground = f"on {with_article(scene.background)} background"
    if not names:
        return f"{with_article(scene.background)} background"
    if len(names) == 1:
        return f"{names[0]} {ground}"
    if len(names) == 3:
        return f"{names[0]}, {names[1]} and {names[2]} {ground}"
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


def coverage(thing: SceneObject, width: int, height: int) -> np.ndarray:
    """The share of each pixel that an object covers, (height, width) float32 in 0..1."""
    mask = np.zeros((height, width), np.float32)
    left, top = (max(0, math.floor(center - thing.reach)) for center in (thing.x, thing.y))
    right, bottom = min(width, math.ceil(thing.x + thing.reach)), min(height, math.ceil(thing.y + thing.reach))
    if left < right and top < bottom:  # only the square around the shape is looked at, point by point
        xs, ys = ((np.arange(SUPERSAMPLING * n) + 0.5) / SUPERSAMPLING for n in (right - left, bottom - top))
        dx, dy = (xs[None, :] + (left - thing.x)) / thing.radius, (ys[:, None] + (top - thing.y)) / thing.radius
        cos, sin = math.cos(math.radians(thing.turn)), math.sin(math.radians(thing.turn))
        covered = inside(thing.shape, cos * dx + sin * dy, cos * dy - sin * dx)
        blocks = covered.reshape(bottom - top, SUPERSAMPLING, right - left, SUPERSAMPLING)
        mask[top:bottom, left:right] = blocks.mean(axis=(1, 3), dtype=np.float32)
    return mask


def mask_of(scene: Scene, wider: float = 0.0) -> np.ndarray:
    """(height, width) float32, 1 on the square around the only object, made `wider` by so many pixels on each side."""
    (thing,) = scene.objects
    reach = thing.reach + wider
    mask = np.zeros((scene.height, scene.width), np.float32)
    left, top = (max(0, math.floor(center - reach)) for center in (thing.x, thing.y))
    mask[top : math.ceil(thing.y + reach), left : math.ceil(thing.x + reach)] = 1
    return mask


def render(scene: Scene) -> np.ndarray:
    """Draw a scene, anti-aliased, as (height, width, 3) uint8."""
    image = np.empty((scene.height, scene.width, 3), np.float32)
    image[:] = COLORS[scene.background]
    for o in scene.objects:
        alpha = coverage(o, scene.width, scene.height)[..., None]
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
    thing = SceneObject(shape, color, RADII[size], _near(rng, width // 2), _near(rng, height // 2))
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
    small = RADII["small"]
    return Scene(background, tuple(SceneObject(shape, color, small, *place) for (color, shape), place in things))


def _somewhere(
    rng: random.Random, color: str, shape: str, canvas: tuple[int, int], most: float, held_out: bool, turned: bool
) -> SceneObject:
    """An object of any radius up to `most`, anywhere on the canvas; a turned circle is as another."""
    width, height = canvas
    while True:
        radius = round(rng.uniform(LEAST_RADIUS, most), 1)
        turn = round(rng.uniform(-MOST_TURN, MOST_TURN), 1) if turned and shape != "circle" else 0.0
        margin = SceneObject(shape, color, radius, 0, 0, turn).reach + MARGIN
        x, y = (round(rng.uniform(margin, side - margin), 1) for side in (width, height))
        thing = SceneObject(shape, color, radius, x, y, turn)
        if place_is_held_out(thing) == held_out:
            return thing


def place_single_freely(
    rng: random.Random,
    triple: tuple[str, str, str],
    canvas: tuple[int, int] = SQUARE,
    held_out: bool = False,
    turned: bool = False,
) -> Scene:
    """A scene of one object of any radius anywhere on the canvas; held_out says which places."""
    color, shape, background = triple
    return Scene(background, (_somewhere(rng, color, shape, canvas, MOST_RADIUS, held_out, turned),), *canvas)


def place_freely(
    rng: random.Random,
    things: Sequence[tuple[str, str]],
    background: str,
    canvas: tuple[int, int] = SQUARE,
    held_out: bool = False,
    turned: bool = False,
) -> Scene:
    """Several objects, each a (color, shape), anywhere without touching; of two, the relation is plain."""
    while True:
        objects = [_somewhere(rng, color, shape, canvas, MOST_PAIR_RADIUS, held_out, turned) for color, shape in things]
        scene = Scene(background, tuple(objects), *canvas)
        if _all_apart(scene):
            return scene


def place_three(rng: random.Random, things: Sequence[tuple[str, str]], background: str) -> Scene:
    """Three small objects in three quarters of a 128x128 scene, named as one reads."""
    sides = LARGE[0] // 4, 3 * LARGE[0] // 4
    quarters = (divmod(quarter, 2) for quarter in sorted(rng.sample(range(4), 3)))
    places = [(_near(rng, sides[column]), _near(rng, sides[row])) for row, column in quarters]
    small = RADII["small"]
    objects = (SceneObject(shape, color, small, *place) for (color, shape), place in zip(things, places, strict=True))
    return Scene(background, tuple(objects), *LARGE)


def sample_three(rng: random.Random, held_out: bool = False, free: bool = False) -> Scene:
    """Three objects of different colors on 128x128, on the grid or anywhere; held out as a pair is."""
    while True:
        background, *colors = rng.sample(list(COLORS), 4)
        things = [(color, rng.choice(SHAPES)) for color in colors]
        scene = place_freely(rng, things, background, LARGE, held_out) if free else place_three(rng, things, background)
        if scene_is_held_out(scene) == held_out:
            return scene


def _all_apart(scene: Scene) -> bool:
    return all(_apart(a, b) for a, b in itertools.combinations(scene.objects, 2))


def _apart(a: SceneObject, b: SceneObject) -> bool:
    dx, dy = abs(a.x - b.x), abs(a.y - b.y)
    return math.hypot(dx, dy) >= a.radius + b.radius + GAP and max(dx, dy) >= PLAIN_RELATION * min(dx, dy)


def sample_pair(
    rng: random.Random, held_out: bool = False, canvas: tuple[int, int] | None = None, turned: bool = False
) -> Scene:
    """Two objects of different colors; a held-out scene has at least one held-out triple.

    On the grid of a 64x64 picture, or with a canvas anywhere on it.
    """
    while True:
        background, *colors = rng.sample(list(COLORS), 3)
        first, second = ((color, rng.choice(SHAPES)) for color in colors)
        if canvas is None:
            scene = place_pair(rng, first, second, background, rng.choice(RELATIONS))
        else:
            scene = place_freely(rng, (first, second), background, canvas, held_out, turned)
        if scene_is_held_out(scene) == held_out:
            return scene


def apply_edit(scene: Scene, kind: str, index: int = 0, word: str | None = None) -> Edit:
    """Edit the object at index, or the background; word is the new color, shape or both, or the side to move to; not
    used to remove. A new shape stands upright."""
    thing = scene.objects[index]

    def with_object(*changed: SceneObject) -> Scene:
        return replace(scene, objects=(*scene.objects[:index], *changed, *scene.objects[index + 1 :]))

    if kind == "recolor":
        return Edit(kind, f"make the {thing.shape} {word}", scene, with_object(replace(thing, color=word)))
    if kind == "background":
        return Edit(kind, f"make the background {word}", scene, replace(scene, background=word))
    if kind == "replace":
        instruction = f"replace the {thing.shape} with {with_article(word)}"
        return Edit(kind, instruction, scene, with_object(replace(thing, shape=word, turn=0.0)))
    if kind == "exchange":
        color, shape = word.split()
        instruction = f"replace the {thing.shape} with {with_article(word)}"
        return Edit(kind, instruction, scene, with_object(replace(thing, color=color, shape=shape, turn=0.0)))
    if kind == "remove":
        return Edit(kind, f"remove the {thing.shape}", scene, with_object())
    if kind == "move":
        place = at_side(thing, word, (scene.width, scene.height))
        return Edit(kind, f"move the {thing.shape} to the {word}", scene, with_object(place))
    raise ValueError(f"unknown edit {kind!r}; one of {', '.join((*EDIT_KINDS, 'move'))}")


def at_side(thing: SceneObject, side: str, canvas: tuple[int, int]) -> SceneObject:
    """The object moved straight to a side of the canvas, or into its middle."""
    (width, height), margin = canvas, thing.reach + SIDE_MARGIN
    if side == "middle":
        return replace(thing, x=width / 2, y=height / 2)
    if side in ("left", "right"):
        return replace(thing, x=round(margin if side == "left" else width - margin, 1))
    return replace(thing, y=round(margin if side == "top" else height - margin, 1))


def moves(scene: Scene) -> list[Edit]:
    """Every move of an object that is far enough to be seen and touches nothing."""
    every = [apply_edit(scene, "move", index, side) for index in range(len(scene.objects)) for side in SIDES]
    return [edit for edit in every if _is_far(edit) and _all_apart(edit.target)]


def _is_far(edit: Edit) -> bool:
    pairs = zip(edit.source.objects, edit.target.objects, strict=True)
    return any(math.hypot(a.x - b.x, a.y - b.y) >= LEAST_MOVE for a, b in pairs)


def edit_scene(rng: random.Random, scene: Scene, kind: str) -> Edit:
    """An edit of this kind that changes something and leaves no two objects of one color."""
    word = None
    colors = [c for c in COLORS if c != scene.background and all(c != o.color for o in scene.objects)]
    shapes = [s for s in SHAPES if all(s != o.shape for o in scene.objects)]
    if kind in ("recolor", "background"):
        word = rng.choice(colors)
    elif kind == "replace":
        word = rng.choice(shapes)
    elif kind == "exchange":
        word = f"{rng.choice(colors)} {rng.choice(shapes)}"
    return apply_edit(scene, kind, rng.randrange(len(scene.objects)), word)


def sample_edit(
    rng: random.Random,
    kind: str,
    held_out: bool = False,
    canvas: tuple[int, int] = SQUARE,
    pair: bool = False,
    free: bool = False,
    turned: bool = False,
) -> Edit:
    """An edit of one object, or of one of two; held out if its target is (for a removal, its source), else neither is.

    Of two objects the instruction names one by its shape, so their shapes differ. `free` objects lie anywhere, held-out
    ones at held-out places, and may be turned; else they lie on the grid.
    """
    while True:
        if pair and free:
            background, *colors = rng.sample(list(COLORS), 3)
            things = list(zip(colors, rng.sample(SHAPES, 2), strict=True))
            scene = place_freely(rng, things, background, canvas, held_out, turned)
        elif pair:
            scene = sample_pair(rng, held_out and rng.random() < 0.5)
            if scene.objects[0].shape == scene.objects[1].shape:
                continue
        else:
            color, background = rng.sample(list(COLORS), 2)
            triple = color, rng.choice(SHAPES), background
            if free:
                scene = place_single_freely(rng, triple, canvas, held_out, turned)
            else:
                scene = place_single(rng, triple, canvas=canvas)
        possible = moves(scene) if kind == "move" else ()
        if kind == "move" and not possible:
            continue
        edit = rng.choice(possible) if possible else edit_scene(rng, scene, kind)
        source_out, target_out = scene_is_held_out(edit.source), scene_is_held_out(edit.target)
        if held_out and (source_out if kind == "remove" else target_out):
            return edit
        if not held_out and not source_out and not target_out:
            return edit


# --- variations, for training: scenes that differ in few things, so that few pictures give many edits


def vary_single(rng: random.Random, thing: SceneObject, canvas: tuple[int, int]) -> list[Scene]:
    """One place and size with two shapes, two colors and two backgrounds, and one of them moved, without held-out
    triples. Of a turned thing the second shape stands upright."""
    colors, shapes = rng.sample(list(COLORS), 4), rng.sample(SHAPES, 2)
    things = _as(thing, shapes[0]), replace(thing, shape=shapes[1], turn=0.0)
    every = itertools.product(things, colors[:2], colors[2:])
    scenes = [Scene(ground, (replace(thing, color=color),), *canvas) for thing, color, ground in every]
    scenes = [scene for scene in scenes if not scene_is_held_out(scene)]
    return scenes + _one_moved(rng, scenes)


def _as(thing: SceneObject, shape: str) -> SceneObject:
    return replace(thing, shape=shape, turn=0.0 if shape == "circle" else thing.turn)


def _one_moved(rng: random.Random, scenes: Sequence[Scene]) -> list[Scene]:
    every = moves(rng.choice(scenes)) if scenes else []
    chosen = [rng.choice(every).target] if every else []
    return [scene for scene in chosen if not any(map(place_is_held_out, scene.objects))]


def vary_pair(rng: random.Random, scene: Scene) -> list[Scene]:
    """Two objects anew, each with another color, another shape and without it, another background, and one moved.

    Of the scene only places and sizes stay. None holds a held-out triple, and no two things of one have one name.
    """
    while True:
        shapes, colors = rng.sample(SHAPES, 4), rng.sample(list(COLORS), 6)
        objects = tuple(
            replace(_as(o, shape), color=color) for o, shape, color in zip(scene.objects, shapes, colors, strict=False)
        )
        first = replace(scene, background=colors[4], objects=objects)
        edits = [apply_edit(first, "background", 0, colors[5])]
        for index in range(2):
            words = (("recolor", colors[2 + index]), ("replace", shapes[2 + index]), ("remove", None))
            edits += [apply_edit(first, kind, index, word) for kind, word in words]
        scenes = [first, *(edit.target for edit in edits)]
        if not scene_is_held_out(first):
            return [scene for scene in scenes if not scene_is_held_out(scene)] + _one_moved(rng, [first])


def edits_among(scenes: Sequence[Scene]) -> list[Edit]:
    """Every single edit that leads from one of the scenes to another, and the removals of an only object."""
    edits = [edit for a, b in itertools.permutations(scenes, 2) if (edit := edit_between(a, b))]
    return edits + [apply_edit(scene, "remove") for scene in scenes if len(scene.objects) == 1]


def edit_between(source: Scene, target: Scene) -> Edit | None:
    """The one edit from a scene to another, None when they differ in more or in nothing."""
    candidates = [apply_edit(source, "background", 0, target.background)]
    for index in range(len(source.objects)):
        candidates.append(apply_edit(source, "remove", index))
        if index < len(target.objects):
            after = target.objects[index]
            candidates.append(apply_edit(source, "recolor", index, after.color))
            candidates.append(apply_edit(source, "replace", index, after.shape))
            if after.color != source.objects[index].color and after.shape != source.objects[index].shape:
                candidates.append(apply_edit(source, "exchange", index, f"{after.color} {after.shape}"))
    if len(source.objects) == len(target.objects):
        candidates += moves(source)
    return next((edit for edit in candidates if edit.target == target != source), None)
