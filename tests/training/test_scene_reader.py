"""The evaluator is itself tested: on rendered pictures, whose content is known, and on pictures of nothing."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from scene_reader import read_scene, shows

from training.drawn_by_hand import sample_drawn_edits
from training.scenes import (
    CANVASES,
    COLORS,
    EDIT_KINDS,
    RADII,
    SHAPES,
    Scene,
    SceneObject,
    apply_edit,
    caption,
    coverage,
    edit_between,
    edits_among,
    is_held_out,
    moves,
    place_freely,
    place_is_held_out,
    place_single,
    place_single_freely,
    render,
    sample_edit,
    sample_pair,
    triples,
    vary_pair,
    vary_single,
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


def test_reads_scenes_of_any_size_anywhere():
    rng = random.Random("anywhere")
    every = triples(held_out=False)
    scenes = [place_single_freely(rng, rng.choice(every), rng.choice(CANVASES)) for _ in range(60)]
    scenes += [place_single_freely(rng, rng.choice(every), rng.choice(CANVASES), turned=True) for _ in range(60)]
    scenes += [sample_pair(rng, canvas=(64, 64), turned=bool(number % 2)) for number in range(40)]
    scenes += [
        place_freely(rng, list(zip(rng.sample(list(COLORS), 3), SHAPES)), "white", (128, 128)) for _ in range(10)
    ]
    scenes = [scene for scene in scenes if all(o.color != scene.background for o in scene.objects)]
    right = sum(shows(read_scene(render(scene)), scene) for scene in scenes)
    assert right >= 0.99 * len(scenes)


def test_reads_what_pillow_draws():
    """Its circles and polygons lie where the renderer's do, which the ideal result of an edit relies on."""
    edits = sample_drawn_edits(random.Random("drawn"), 40)
    for edit in edits:
        (seen,) = read_scene(np.asarray(edit.source.picture())).objects
        assert (seen.shape, seen.color) == (edit.source.shape, edit.source.color), edit.instruction
        assert (seen.x, seen.y) == pytest.approx((edit.source.x, edit.source.y), abs=1.0)
        (drawn,) = read_scene(render(as_scene(edit.source))).objects
        assert (seen.x, seen.y) == pytest.approx((drawn.x, drawn.y), abs=1.0)


def as_scene(drawing) -> Scene:
    """The same thing for the renderer."""
    thing = SceneObject(drawing.shape, drawing.color, drawing.radius, drawing.x, drawing.y)
    return Scene(drawing.background, (thing,))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_its_area_wherever_it_lies(shape: str):
    areas = {"circle": np.pi * 0.95**2, "square": 1.64**2, "diamond": 2.0, "triangle": 0.95 * 1.7}
    areas["star"] = 10 * 0.5 * 0.42 * np.sin(np.pi / 5)
    for radius, x, y in ((14.0, 32, 32), (8.3, 9.4, 53.1), (25.9, 36.7, 27.2)):
        for turn in (0.0, 10.0):
            thing = SceneObject(shape, "red", radius, x, y, turn)
            assert coverage(thing, 64, 64).sum() == pytest.approx(areas[shape] * radius**2, rel=0.02)
    half = SceneObject(shape, "red", 14.0, 0, 32)
    assert coverage(half, 64, 64).sum() == pytest.approx(areas[shape] * 14.0**2 / 2, rel=0.02)


def test_a_turned_shape_is_turned_clockwise_about_its_center():
    thing = SceneObject("triangle", "red", 20.0, 32.0, 32.0)
    upright, turned = (coverage(replace(thing, turn=turn), 64, 64) for turn in (0.0, 10.0))
    assert upright[:, :32].sum() == pytest.approx(upright[:, 32:].sum())
    assert turned[:20, 32:].sum() > 2 * turned[:20, :32].sum(), "its tip points to the right"


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
        return replace(scene, objects=(replace(first, radius=RADII["small" if first.size == "large" else "large"]),))
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


def test_free_objects_keep_apart_and_inside():
    rng = random.Random("apart")
    for number in range(60):
        scene = sample_edit(
            rng, (*EDIT_KINDS, "move")[number % 6], number % 3 == 0, pair=number % 2 == 0, free=True, turned=number > 30
        ).target
        for thing in scene.objects:
            assert thing.radius >= 8
            assert thing.radius <= min(thing.x, thing.y, scene.width - thing.x, scene.height - thing.y)
            assert abs(thing.turn) <= 10 and not (thing.turn and thing.shape == "circle")
            alone = render(replace(scene, objects=(thing,)))
            edge = np.concatenate([alone[[0, -1]].reshape(-1, 3), alone[:, [0, -1]].reshape(-1, 3)])
            assert (edge == edge[0]).all(), "nothing is cut off"
        for first, second in zip(scene.objects, scene.objects[1:], strict=False):
            distance = np.hypot(first.x - second.x, first.y - second.y)
            assert distance > first.radius + second.radius


def test_held_out_places_are_apart_from_those_of_training():
    rng = random.Random("places")
    for held_out in (False, True):
        edits = [
            sample_edit(rng, kind, held_out, pair=pair, free=True) for kind in EDIT_KINDS for pair in (False, True)
        ]
        things = [thing for edit in edits for thing in edit.source.objects]
        assert all(place_is_held_out(thing) == held_out for thing in things)
    on_grid = [place_single(rng, rng.choice(triples(held_out=True))).objects[0] for _ in range(100)]
    assert not any(map(place_is_held_out, on_grid))
    anywhere = [place_single_freely(rng, ("red", "star", "blue")).objects[0] for _ in range(300)]
    assert not any(map(place_is_held_out, anywhere))
    held = [thing for thing in anywhere if place_is_held_out(replace(thing, x=thing.x + 1))]
    assert 0.05 < len(held) / len(anywhere) < 0.3


def test_variations_give_every_kind_of_edit_and_no_held_out_triple():
    rng = random.Random("variations")
    for pair in (False, True):
        kinds = set()
        for _ in range(30):
            if pair:
                family = vary_pair(rng, sample_pair(rng, canvas=(64, 64), turned=True))
            else:
                free = place_single_freely(rng, ("red", "star", "blue"), turned=rng.random() < 0.5)
                family = vary_single(rng, free.objects[0], (64, 64))
            for edit in edits_among(family):
                kinds.add(edit.kind)
                assert edit.source in family
                assert edit.target in family or not edit.target.objects
                names = [o.shape for o in edit.source.objects]
                assert len(set(names)) == len(names), "the instruction would name two objects"
                assert edit.source != edit.target
            assert not any(is_held_out(o.color, o.shape, s.background) for s in family for o in s.objects)
        assert kinds == {*EDIT_KINDS, "move"}


def test_an_object_is_moved_straight_to_a_side_where_nothing_is_in_its_way():
    small = SceneObject("star", "red", 8.0, 20.0, 30.0, 5.0)
    scene = Scene("white", (small, SceneObject("circle", "blue", 8.0, 50.0, 30.0)))
    targets = {edit.instruction: edit.target.objects for edit in moves(scene)}
    assert set(targets) == {
        *(f"move the star to the {side}" for side in ("left", "top", "bottom")),
        *(f"move the circle to the {side}" for side in ("top", "bottom")),
    }  # each is in the other's way, and the circle is on the right already
    left = targets["move the star to the left"][0]
    assert (left.x, left.y, left.turn) == (12.8, 30.0, 5.0)
    alone = Scene("white", (small,))
    assert {"right", "middle"} <= {edit.instruction.split()[-1] for edit in moves(alone)}
    assert edit_between(scene, replace(scene, objects=(left, scene.objects[1]))).kind == "move"


def test_a_new_shape_stands_upright_and_a_new_color_does_not_turn():
    scene = Scene("white", (SceneObject("star", "red", 12.0, 30.0, 31.0, turn=7.0),))
    turns = {kind: apply_edit(scene, kind, 0, "blue").target.objects[0].turn for kind in ("recolor", "background")}
    assert turns == {"recolor": 7.0, "background": 7.0}
    assert apply_edit(scene, "replace", 0, "square").target.objects[0].turn == 0
    assert apply_edit(scene, "exchange", 0, "blue square").target.objects[0].turn == 0


def test_edits_among_pictures_by_hand():
    red = Scene("white", (SceneObject("star", "red", 12.0, 30.0, 31.0),))
    blue = replace(red, objects=(replace(red.objects[0], color="blue"),))
    circle = replace(red, objects=(replace(red.objects[0], shape="circle"),))
    found = {(edit.instruction, edit.source, edit.target) for edit in edits_among([red, blue, circle])}
    empty = Scene("white", ())
    assert found == {
        ("make the star blue", red, blue),
        ("make the star red", blue, red),
        ("replace the star with a circle", red, circle),
        ("replace the circle with a star", circle, red),
        ("remove the star", red, empty),
        ("remove the star", blue, empty),
        ("remove the circle", circle, empty),
        ("replace the star with a red circle", blue, circle),
        ("replace the circle with a blue star", circle, blue),
    }


def test_a_caption_names_three_objects():
    things = tuple(
        SceneObject(shape, color, 9.0, x, 30.0)
        for shape, color, x in (("star", "red", 20.0), ("circle", "blue", 60.0), ("square", "orange", 100.0))
    )
    text = "a red star, a blue circle and an orange square on a white background"
    assert caption(Scene("white", things, 128, 128)) == text


def test_sizes_that_are_named_are_the_nominal_ones():
    assert {SceneObject("star", "red", radius, 0, 0).size for radius in (8, RADII["small"], 17.9)} == {"small"}
    assert {SceneObject("star", "red", radius, 0, 0).size for radius in (18, RADII["large"], 26)} == {"large"}
