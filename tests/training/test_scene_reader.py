"""The evaluator is itself tested: on rendered pictures, whose content is known, and on pictures of nothing."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from scene_reader import read_scene, shows

from training.scenes import (
    CANVASES,
    COLORS,
    EDIT_KINDS,
    Scene,
    caption,
    is_held_out,
    place_single,
    render,
    sample_edit,
    sample_pair,
    triples,
)


def some_scenes(count: int, seed: str) -> list[Scene]:
    """Scenes of every kind: all canvases, one object, two objects, none."""
    rng = random.Random(seed)
    every = triples(held_out=False) + triples(held_out=True)
    singles = [place_single(rng, rng.choice(every), canvas=rng.choice(CANVASES)) for _ in range(count // 2)]
    pairs = [sample_pair(rng) for _ in range(count - len(singles) - len(COLORS))]
    return singles + pairs + [Scene(color, ()) for color in COLORS]


def test_reads_rendered_scenes():
    scenes = some_scenes(300, "plain")
    right = sum(shows(read_scene(render(scene)), scene, sizes=True) for scene in scenes)
    assert right >= 0.99 * len(scenes)


def test_noise_has_no_shape():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not any(o.shape and o.color for o in read_scene(noise).objects)


def test_blob_without_a_shape_gets_no_name():
    image = np.full((64, 64, 3), 245, np.uint8)
    image[20:24, 8:56] = (224, 32, 32)  # a bar
    (seen,) = read_scene(image).objects
    assert (seen.shape, seen.color) == (None, "red")


@pytest.mark.parametrize("change", ["background", "color", "shape", "relation", "size"])
def test_a_wrong_picture_is_told_from_a_right_one(change: str):
    rng = random.Random(change)
    for _ in range(20):
        scene = sample_pair(rng) if change == "relation" else place_single(rng, rng.choice(triples(held_out=False)))
        wrong = mistake(rng, scene, change)
        assert not shows(read_scene(render(wrong)), scene, sizes=True), (caption(scene), caption(wrong))


def mistake(rng: random.Random, scene: Scene, change: str) -> Scene:
    """The same scene with one thing wrong."""
    first = scene.objects[0]
    free = [c for c in COLORS if c not in (first.color, scene.background)]
    if change == "background":
        return replace(scene, background=rng.choice(free))
    if change == "color":
        return replace(scene, objects=(replace(first, color=rng.choice(free)),))
    if change == "shape":
        return replace(scene, objects=(replace(first, shape="star" if first.shape != "star" else "circle"),))
    if change == "size":
        return replace(scene, objects=(replace(first, size="small" if first.size == "large" else "large"),))
    second = scene.objects[1]
    swapped = (replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y))
    return replace(scene, objects=swapped)


def test_split_holds_out_a_tenth_and_training_never_shows_it():
    held, shown = triples(held_out=True), triples(held_out=False)
    assert len(held) >= 0.1 * (len(held) + len(shown))
    rng = random.Random(0)
    scenes = [sample_pair(rng) for _ in range(200)]
    for kind in EDIT_KINDS:
        for number in range(100):
            edit = sample_edit(rng, kind, pair=number % 2 == 0)
            scenes += [edit.source, edit.target]
    assert not any(is_held_out(o.color, o.shape, scene.background) for scene in scenes for o in scene.objects)
