"""The shipped checkpoint draws what it is asked: a small seeded sample of `training/evaluate.py`, read from pixels.

The limits leave room for a sampler's noise and none for a broken part: `test_the_sample_notices` breaks conditioning,
guidance, positions and edit handling one by one and wants every one of them to show.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scene_reader import read_scene, shows

import nextstep_core
from nextstep_core.decoding import engine, steps
from nextstep_core.pipeline import NextStepPipeline, to_pixels
from training.evaluate import Score, measure_edits, measure_pairs, measure_singles
from training.scenes import CANVASES, COLORS, SHAPES, place_single, render, sample_pair

ASSETS = Path(nextstep_core.__file__).parent / "assets" / "tiny"
LARGEST = 12 * 2**20
LEAST = {"singles": 0.85, "edits": 0.75, "wide": 0.7, "pairs": 0.6}


def load() -> NextStepPipeline:
    return NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny() -> NextStepPipeline:
    return load()


def sample(pipeline: NextStepPipeline, what: str, **settings) -> Score:
    """A few pictures of one kind, the same ones every time."""
    if what == "singles":
        return measure_singles(pipeline, 20, **settings)
    if what == "wide":
        return measure_singles(pipeline, 10, canvas=CANVASES[1], **settings)
    return {"edits": measure_edits, "pairs": measure_pairs}[what](pipeline, 10 if what == "pairs" else 12, **settings)


def test_fits_its_size():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= LARGEST


@pytest.mark.parametrize("what", LEAST)
def test_draws_what_it_is_asked(tiny: NextStepPipeline, what: str):
    score = sample(tiny, what)
    assert score.share("all") >= LEAST[what], str(score)


@pytest.mark.parametrize("recipe", ["int8", "int4", "fp8"])
def test_quantized_weights_draw_what_they_are_asked(recipe: str):
    quantized = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32, quantization=recipe)
    score = sample(quantized, "singles")
    assert score.share("all") >= LEAST["singles"], str(score)


def test_vae_keeps_what_the_picture_shows(tiny: NextStepPipeline):
    rng = random.Random("through the VAE")
    scenes = [sample_pair(rng) for _ in range(20)]
    for _ in range(80):
        color, background = rng.sample(list(COLORS), 2)
        scenes.append(place_single(rng, (color, rng.choice(SHAPES), background), canvas=rng.choice(CANVASES)))
    right = 0
    for scene in scenes:
        with torch.inference_mode():
            latents, _ = tiny.vae.encode_moments(to_pixels(render(scene).astype(np.float32) / 255))
            pixels = tiny.vae.decode(latents)
        image = ((pixels[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        right += shows(read_scene(image), scene, sizes=True)
    assert right >= 0.97 * len(scenes)


def break_conditioning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row gets the text of another."""
    embed = engine.TextEmbedding.forward
    monkeypatch.setattr(engine.TextEmbedding, "forward", lambda self, ids: embed(self, ids).flip(0))


def break_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branches change places: guidance pushes away from the caption."""
    guide = steps.guide
    monkeypatch.setattr(steps, "guide", lambda v, branches, *cfg: guide(v.roll(len(v) // branches, 0), branches, *cfg))


def break_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions run backwards."""
    table = steps.rotary_table
    monkeypatch.setattr(steps, "rotary_table", lambda *args: table(*args).flip(1))


def break_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The input image does not arrive."""
    encode = NextStepPipeline.encode_image

    def encode_nothing(self, image, *tile):
        encoded = encode(self, image, *tile)
        return type(encoded)(torch.zeros_like(encoded.tokens), encoded.grid)

    monkeypatch.setattr(NextStepPipeline, "encode_image", encode_nothing)


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (break_conditioning, "singles"),
        (break_guidance, "singles"),
        (break_positions, "singles"),
        (break_edits, "edits"),
    ],
)
def test_the_sample_notices(monkeypatch: pytest.MonkeyPatch, broken, what: str):
    broken(monkeypatch)
    score = sample(load(), what)  # a fresh pipeline: the engine remembers prompts it has read
    assert score.share("all") < LEAST[what], str(score)
