"""Measure what a tiny checkpoint draws: accuracy on held-out prompts, read from the pixels.

python -m training.evaluate                     # the shipped checkpoint at its recommended settings, beside cfg 1
python -m training.evaluate --count 40 --sheet sheet.png
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nextstep_core.decoding.job import KnownTokens
from nextstep_core.pipeline import NextStepPipeline
from nextstep_core.request.layout import IMAGE_SLOT, Caption
from nextstep_core.request.masks import kept_tokens
from nextstep_core.runtime.quantization import RECIPES
from tests.scene_reader import read_scene, shows
from training.drawn_by_hand import sample_drawn_edits
from training.scenes import (
    CANVASES,
    COLORS,
    EDIT_KINDS,
    LARGE,
    SHAPES,
    SQUARE,
    Edit,
    Scene,
    caption,
    edit_between,
    mask_of,
    place_freely,
    place_single,
    place_single_freely,
    render,
    sample_edit,
    sample_pair,
    scene_is_held_out,
    triples,
)

BATCH = 10  # pictures a call: those of one call share their noise, so several seeds make a fair sample
LEAST_PSNR = 22.0  # dB, of what an edit leaves alone
SHOWN = 10  # pictures of each row of the contact sheet
SMALL_ENOUGH = 18.0  # the largest radius of an object that is masked: more would mask the whole picture


@dataclass
class Score:
    """How often each thing was right, and the first pictures."""

    count: int = 0
    right: Counter[str] = field(default_factory=Counter)
    shown: list[np.ndarray] = field(default_factory=list)

    def add(self, *pictures: np.ndarray, **verdicts: bool) -> None:
        """Record one picture's verdicts; with an edit's source, the source first."""
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(np.concatenate(pictures))
        self.right.update({name: int(verdict) for name, verdict in verdicts.items()})

    def share(self, name: str) -> float:
        """How often this was right, 0..1."""
        return self.right[name] / self.count

    def __str__(self) -> str:
        return " ".join(f"{name} {self.share(name):.1%}" for name in self.right)


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    """Consecutive runs of at most size items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def draw(
    pipeline: NextStepPipeline, prompts: Sequence[str], canvas: tuple[int, int], seed: int, **settings
) -> np.ndarray:
    """Pictures (n, height, width, 3) uint8."""
    width, height = canvas
    images = pipeline.generate(list(prompts), width=width, height=height, seed=seed, **settings).images
    return (images.numpy() * 255).round().astype(np.uint8)


def held_out_singles(count: int, seed: int, canvas: tuple[int, int]) -> list[tuple[str, Scene, bool]]:
    """(caption, scene, whether the size is named) on triples never trained on; only position is free to the model."""
    rng = random.Random(f"held-out singles {seed} {canvas}")
    every = triples(held_out=True)
    rng.shuffle(every)
    scenes = [place_single(rng, every[i % len(every)], canvas=canvas) for i in range(count)]
    sized = [rng.random() < 0.5 for _ in scenes]
    return [(caption(scene, name_size=named), scene, named) for scene, named in zip(scenes, sized, strict=True)]


def judge_single(image: np.ndarray, scene: Scene, sized: bool) -> dict[str, bool]:
    """The verdicts on one object in one picture; more objects than one count as none."""
    reading, wanted = read_scene(image), scene.objects[0]
    seen = reading.objects[0] if len(reading.objects) == 1 else None
    background = reading.background == scene.background
    color, shape = (seen is not None and getattr(seen, name) == getattr(wanted, name) for name in ("color", "shape"))
    size = not sized or (seen is not None and seen.size == wanted.size)
    right = background and color and shape
    return {"background": background, "color": color, "shape": shape, "size": size, "all": right}


def measure_singles(
    pipeline: NextStepPipeline, count: int, seed: int = 0, canvas: tuple[int, int] = SQUARE, **settings
) -> Score:
    """One object on one background. "all" is background, color and shape together."""
    score = Score()
    for number, part in enumerate(batches(held_out_singles(count, seed, canvas), BATCH)):
        images = draw(pipeline, [text for text, _, _ in part], canvas, seed * 1000 + number, **settings)
        for image, (_, scene, sized) in zip(images, part, strict=True):
            score.add(image, **judge_single(image, scene, sized))
    return score


def measure_pairs(pipeline: NextStepPipeline, count: int, seed: int = 0, **settings) -> Score:
    """Two objects and their relation. "all" is background, both objects and relation together."""
    rng, score = random.Random(f"held-out pairs {seed}"), Score()
    scenes = [sample_pair(rng, held_out=True) for _ in range(count)]
    for number, part in enumerate(batches(scenes, BATCH)):
        images = draw(pipeline, [caption(scene) for scene in part], SQUARE, seed * 1000 + number, **settings)
        for image, scene in zip(images, part, strict=True):
            reading = read_scene(image)
            colors = sorted(str(o.color) for o in reading.objects) == sorted(o.color for o in scene.objects)
            shapes = sorted(str(o.shape) for o in reading.objects) == sorted(o.shape for o in scene.objects)
            ground = reading.background == scene.background
            score.add(image, background=ground, colors=colors, shapes=shapes, all=shows(reading, scene))
    return score


def measure_three(pipeline: NextStepPipeline, count: int, seed: int = 0, **settings) -> Score:
    """Three objects anywhere on 128x128, of which no relation is named."""
    rng, score, scenes = random.Random(f"held-out threes {seed}"), Score(), []
    while len(scenes) < count:
        background, *colors = rng.sample(list(COLORS), 4)
        scene = place_freely(rng, [(color, rng.choice(SHAPES)) for color in colors], background, LARGE)
        if scene_is_held_out(scene):
            scenes.append(scene)
    for number, part in enumerate(batches(scenes, BATCH)):
        images = draw(pipeline, [caption(scene) for scene in part], LARGE, seed * 1000 + number, **settings)
        for image, scene in zip(images, part, strict=True):
            score.add(image, all=shows(read_scene(image), scene))
    return score


def measure_edits(
    pipeline: NextStepPipeline,
    count: int,
    seed: int = 0,
    pair: bool = False,
    free: bool = False,
    turned: bool = False,
    kinds: Sequence[str] = EDIT_KINDS,
    **settings,
) -> Score:
    """Edits of the kinds in turn, of one object or one of two, on the grid or `free`: at held-out sizes and places, and
    maybe turned.

    "all" is the change made and the rest kept; of free objects "kept" asks for place and size too: the whole picture is
    compared with the ideal result.
    """
    rng, score = random.Random(f"held-out edits {seed}"), Score()
    edits = [sample_edit(rng, kinds[i % len(kinds)], True, pair=pair, free=free, turned=turned) for i in range(count)]
    for number, part in enumerate(batches(edits, BATCH)):
        sources = [render(edit.source) for edit in part]
        images = draw_edits(pipeline, [edit.instruction for edit in part], sources, seed * 1000 + number, **settings)
        for image, source, edit in zip(images, sources, part, strict=True):
            changed = shows(read_scene(image), edit.target)
            quality = psnr(image, render(edit.target)) if free else untouched_psnr(image, edit)
            kept = quality >= LEAST_PSNR
            score.add(source, image, changed=changed, kept=kept, all=changed and kept)
    return score


def measure_drawn_edits(pipeline: NextStepPipeline, count: int, seed: int = 0, **settings) -> Score:
    """Edits of every kind of pictures that pillow drew; "all" and "kept" as for free objects."""
    rng, score = random.Random(f"drawn edits {seed}"), Score()
    for number, part in enumerate(batches(sample_drawn_edits(rng, count), BATCH)):
        sources = [np.asarray(edit.source.picture()) for edit in part]
        images = draw_edits(pipeline, [edit.instruction for edit in part], sources, seed * 1000 + number, **settings)
        for image, source, edit in zip(images, sources, part, strict=True):
            wanted, reading = edit.target, read_scene(image)
            seen = [(thing.color, thing.shape) for thing in reading.objects]
            asked = [] if wanted.shape is None else [(wanted.color, wanted.shape)]
            changed = reading.background == wanted.background and seen == asked
            kept = psnr(image, np.asarray(wanted.picture())) >= LEAST_PSNR
            score.add(source, image, changed=changed, kept=kept, all=changed and kept)
    return score


def draw_edits(
    pipeline: NextStepPipeline, instructions: Sequence[str], sources: Sequence[np.ndarray], seed: int, **settings
) -> np.ndarray:
    """Edited pictures (n, 64, 64, 3) uint8."""
    pictures = [Image.fromarray(source) for source in sources]
    return draw(pipeline, [f"<image>{text}" for text in instructions], SQUARE, seed, images=pictures, **settings)


def measure_inpainting(
    pipeline: NextStepPipeline, count: int, seed: int = 0, instructed: bool = False, **settings
) -> Score:
    """The tokens that a single object touches are masked, and another object on the same background is asked for: by a
    caption, which the model reads without seeing the mask, or `instructed`, as an edit of the picture.

    "kept" is that no token outside the mask changed, bit for bit; "all" that the asked object is there alone besides.
    """
    rng, score, engine = random.Random(f"inpainting {seed}"), Score(), pipeline.engine
    wanted = triples(held_out=True)
    for number in range(count):
        color, shape, background = rng.choice(wanted)
        before = masked_scene(rng, color, shape, background)
        source, keep = render(before), kept_tokens(torch.from_numpy(mask_of(before)), (4, 4))
        encoded = pipeline.encode_image(Image.fromarray(source))
        asked = replace(before, objects=(replace(before.objects[0], color=color, shape=shape),))
        edit = edit_between(before, asked)
        text = f"{IMAGE_SLOT}{edit.instruction}" if instructed and edit is not None else caption(asked)
        job = engine.make_job(
            [Caption(text, (encoded,) if instructed else ())],
            encoded.grid,
            engine.recommended(instructed).override(**settings),
            seed=seed * 1000 + number,
            known=KnownTokens(encoded.tokens[None], keep),
        )
        *_, progress = engine.decode(job, pipeline.device, pipeline.dtype)
        with torch.inference_mode():
            pixels = pipeline.vae.decode(engine.latents.to_latents(progress.tokens.float(), encoded.grid))
        image = ((pixels[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        kept = torch.equal(progress.tokens[0, keep].float(), encoded.tokens[keep].float())
        drawn = shows(read_scene(image), asked)
        score.add(source, image, drawn=drawn, kept=kept, all=drawn and kept)
    return score


def masked_scene(rng: random.Random, color: str, shape: str, background: str) -> Scene:
    """An object that differs from the asked one in color and shape, small enough to leave something around it."""
    others = [c for c in COLORS if c not in (color, background)]
    while True:
        triple = rng.choice(others), rng.choice([s for s in SHAPES if s != shape]), background
        scene = place_single_freely(rng, triple, held_out=True)
        if scene.objects[0].radius <= SMALL_ENOUGH:
            return scene


def psnr(image: np.ndarray, ideal: np.ndarray) -> float:
    """In dB, of two pictures in 0..255."""
    error = float(((image.astype(np.float64) - ideal) ** 2).mean())
    return 10 * math.log10(255**2 / max(error, 1e-9))


def untouched_psnr(image: np.ndarray, edit: Edit) -> float:
    """PSNR against the source, in dB, where the edit changes nothing."""
    source, target = render(edit.source), render(edit.target)
    same = (source == target).all(axis=2)
    return psnr(image[same], source[same])


def contact_sheet(scores: Sequence[Score], path: Path, scale: int = 2) -> None:
    """A picture of the first pictures of every measure, a row for each, edits under their sources."""
    rows = [np.concatenate(score.shown, axis=1) for score in scores]
    width = max(row.shape[1] for row in rows)
    sheet = np.concatenate(
        [np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0)), constant_values=128) for row in rows]
    )
    Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.NEAREST).save(path)


def measures(pipeline: NextStepPipeline, count: int, seed: int, **settings) -> Iterator[tuple[str, Score]]:
    """Every row of the table with its name; `count` single objects, half as many of the other kinds."""
    half = max(1, count // 2)
    yield "single objects, 64x64", measure_singles(pipeline, count, seed, **settings)
    yield "edits", measure_edits(pipeline, half, seed, **settings)
    for canvas in CANVASES[1:]:
        score = measure_singles(pipeline, max(1, half // 4), seed, canvas, **settings)
        yield f"single objects, {canvas[0]}x{canvas[1]}", score
    yield "two objects, relation", measure_pairs(pipeline, half, seed, **settings)
    yield "edits of one of two", measure_edits(pipeline, half, seed, pair=True, **settings)
    yield "edits anywhere", measure_edits(pipeline, half, seed, free=True, **settings)
    yield "edits anywhere, of two", measure_edits(pipeline, half, seed, pair=True, free=True, **settings)
    yield "edits anywhere, turned", measure_edits(pipeline, half, seed, free=True, turned=True, **settings)
    yield "moves", measure_edits(pipeline, half, seed, free=True, kinds=("move",), **settings)
    yield "edits of drawings", measure_drawn_edits(pipeline, half, seed, **settings)
    yield "inpainting", measure_inpainting(pipeline, half, seed, **settings)
    yield "inpainting, as an edit", measure_inpainting(pipeline, half, seed, instructed=True, **settings)
    yield "three objects, 128x128", measure_three(pipeline, max(1, half // 4), seed, **settings)


def report(name: str, score: Score) -> None:
    """Print one row of the table."""
    print(f"  {name:24} n={score.count:<4} {score}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="tiny", help='a folder, a hub id or "tiny"')
    parser.add_argument("--count", type=int, default=200, help="single-object prompts; the other rows take half")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quantization", choices=RECIPES, help="store the weights so; default: as they are")
    parser.add_argument("--recommended-only", action="store_true", help="without the column of cfg 1")
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet PNG here")
    args = parser.parse_args()
    pipeline = NextStepPipeline.from_pretrained(args.checkpoint, dtype=torch.float32, quantization=args.quantization)
    recommended = pipeline.engine.recommended()
    print(f"recommended: {recommended}")
    columns = [(f"cfg {recommended.cfg:g} (recommended)", {}), ("cfg 1", {"cfg": 1.0, "cfg_img": 1.0})]
    for name, settings in columns[:1] if args.recommended_only else columns:
        print(f"\n{name}")
        start, scores = time.monotonic(), []
        for row, score in measures(pipeline, args.count, args.seed, **settings):
            report(row, score)
            scores.append(score)
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
        if args.sheet and not settings:
            contact_sheet(scores, args.sheet)


if __name__ == "__main__":
    main()
