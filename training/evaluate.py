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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nextstep_core.pipeline import NextStepPipeline
from nextstep_core.runtime.quantization import RECIPES
from tests.scene_reader import read_scene, shows
from training.scenes import (
    CANVASES,
    EDIT_KINDS,
    SQUARE,
    Edit,
    Scene,
    caption,
    place_single,
    render,
    sample_edit,
    sample_pair,
    triples,
)

BATCH = 10  # pictures a call: those of one call share their noise, so several seeds make a fair sample
LEAST_PSNR = 22.0  # dB, of what an edit leaves alone


@dataclass
class Score:
    """How often each thing was right."""

    count: int = 0
    right: Counter[str] = field(default_factory=Counter)

    def add(self, **verdicts: bool) -> None:
        """Record one picture's verdicts."""
        self.count += 1
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
            score.add(**judge_single(image, scene, sized))
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
            score.add(background=ground, colors=colors, shapes=shapes, all=shows(reading, scene))
    return score


def measure_edits(pipeline: NextStepPipeline, count: int, seed: int = 0, pair: bool = False, **settings) -> Score:
    """Edits of every kind in turn, of one object or one of two. "all" is the change made and the rest kept."""
    rng, score = random.Random(f"held-out edits {seed}"), Score()
    edits = [sample_edit(rng, EDIT_KINDS[i % len(EDIT_KINDS)], held_out=True, pair=pair) for i in range(count)]
    for number, part in enumerate(batches(edits, BATCH)):
        prompts = [f"<image>{edit.instruction}" for edit in part]
        sources = [Image.fromarray(render(edit.source)) for edit in part]
        images = draw(pipeline, prompts, SQUARE, seed * 1000 + number, images=sources, **settings)
        for image, edit in zip(images, part, strict=True):
            changed = shows(read_scene(image), edit.target)
            kept = untouched_psnr(image, edit) >= LEAST_PSNR
            score.add(changed=changed, kept=kept, all=changed and kept)
    return score


def untouched_psnr(image: np.ndarray, edit: Edit) -> float:
    """PSNR against the source, in dB, where the edit changes nothing."""
    source, target = render(edit.source).astype(np.float64), render(edit.target).astype(np.float64)
    same = (source == target).all(axis=2)
    return 10 * math.log10(255**2 / max(float(((image - source)[same] ** 2).mean()), 1e-9))


def contact_sheet(pipeline: NextStepPipeline, path: Path, scale: int = 2) -> None:
    """A picture of 40 held-out pictures, for the eye: singles, pairs, then edits with their sources."""
    rng = random.Random("sheet")
    rows = [draw(pipeline, [t for t, _, _ in held_out_singles(10, n, SQUARE)], SQUARE, n) for n in range(2)]
    rows.append(draw(pipeline, [caption(sample_pair(rng, held_out=True)) for _ in range(10)], SQUARE, 2))
    edits = [sample_edit(rng, EDIT_KINDS[i % 4], held_out=True) for i in range(10)]
    sources = [render(edit.source) for edit in edits]
    prompts = [f"<image>{edit.instruction}" for edit in edits]
    rows += [np.stack(sources), draw(pipeline, prompts, SQUARE, 3, images=[Image.fromarray(s) for s in sources])]
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.NEAREST).save(path)


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
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet PNG here")
    args = parser.parse_args()
    pipeline = NextStepPipeline.from_pretrained(args.checkpoint, dtype=torch.float32, quantization=args.quantization)
    recommended = pipeline.engine.recommended()
    print(f"recommended: {recommended}")
    half = max(1, args.count // 2)
    for name, settings in ((f"cfg {recommended.cfg:g} (recommended)", {}), ("cfg 1", {"cfg": 1.0, "cfg_img": 1.0})):
        print(f"\n{name}")
        start = time.monotonic()
        report("single objects, 64x64", measure_singles(pipeline, args.count, args.seed, **settings))
        report("edits", measure_edits(pipeline, half, args.seed, **settings))
        for canvas in CANVASES[1:]:
            score = measure_singles(pipeline, max(1, half // 4), args.seed, canvas, **settings)
            report(f"single objects, {canvas[0]}x{canvas[1]}", score)
        report("two objects, relation", measure_pairs(pipeline, half, args.seed, **settings))
        report("edits of one of two", measure_edits(pipeline, half, args.seed, pair=True, **settings))
        print(f"  {time.monotonic() - start:.0f} s", flush=True)
    if args.sheet:
        contact_sheet(pipeline, args.sheet)


if __name__ == "__main__":
    main()
