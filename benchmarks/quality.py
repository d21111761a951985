"""What the quality scores see: rank correlations of each with how much pictures were degraded, all pictures together,
and of how many degraded ones the quality gate lets pass.

python -m benchmarks.quality
python -m benchmarks.quality --count 30 --model FOLDER --json quality.json

Needs scikit-image, whose package holds the photographs, and its SciPy.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.report import context
from nextstep_core import NextStepPipeline
from nextstep_core.studio.quality import measure_quality
from nextstep_core.studio.selection import quality_gate
from training.evaluate import LARGE, held_out_singles
from training.scenes import SQUARE, caption, sample_pair

Picture = np.ndarray  # (H, W, 3) float32 in [0, 1]
Degrade = Callable[[Picture, float], Picture]

COLOR = ("astronaut", "chelsea", "coffee", "color", "hubble_deep_field", "ihc", "motorcycle_left", "retina", "rocket")
GRAY = ("brick", "camera", "coins", "grass", "gravel", "moon")
BATCH = 10


def photographs(names: Sequence[str] = COLOR + GRAY) -> dict[str, Picture]:
    """Photographs that lie in scikit-image's own package, whole."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    found = {name: next(folder.glob(f"{name}.*")) for name in names}
    return {name: np.asarray(Image.open(path).convert("RGB"), np.float32) / 255 for name, path in found.items()}


def drawn(pipeline: NextStepPipeline, count: int) -> dict[str, Picture]:
    """Pictures that the embedded model draws of held-out prompts, half of one object and a quarter each of two and of
    128x128."""
    rng = random.Random("quality")
    quarter = max(1, count // 4)
    singles = [text for text, _, _ in held_out_singles(max(1, count - 2 * quarter), 0, SQUARE)]
    pairs = [caption(sample_pair(rng, held_out=True)) for _ in range(quarter)]
    large = [text for text, _, _ in held_out_singles(quarter, 0, LARGE)]
    pictures: dict[str, Picture] = {}
    for prompts, (width, height) in ((singles + pairs, SQUARE), (large, LARGE)):
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            seeds = range(start, start + len(part))
            images = pipeline.generate(part, width=width, height=height, seed=seeds).images
            pictures |= {f"{text}, {width}x{height}": image.numpy() for text, image in zip(part, images)}
    return pictures


# --- degrading


def rounded(picture: Picture) -> Picture:
    """As a file of 8 bits a channel gives it back."""
    return (picture.clip(0, 1) * 255).round().astype(np.float32) / 255


def blurred(picture: Picture, sigma: float) -> Picture:
    """By a Gaussian of so many pixels."""
    from skimage.filters import gaussian

    return picture if not sigma else gaussian(picture, sigma, mode="nearest", channel_axis=-1)


def compressed(picture: Picture, quality: float) -> Picture:
    """Through a JPEG file; 100 leaves it as it is."""
    if quality == 100:
        return picture
    file = io.BytesIO()
    Image.fromarray((rounded(picture) * 255).round().astype(np.uint8)).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file).convert("RGB"), np.float32) / 255


def posterized(picture: Picture, levels: float) -> Picture:
    """To so many levels a channel."""
    return (picture * (levels - 1)).round() / (levels - 1)


def grained(picture: Picture, sigma: float) -> Picture:
    """With noise of so many levels of 255."""
    noise = np.random.default_rng(0).normal(0, sigma / 255, picture.shape)
    return (picture + noise).clip(0, 1)


def faded(picture: Picture, share: float) -> Picture:
    """So far towards gray."""
    gray = picture @ np.array([0.299, 0.587, 0.114], np.float32)
    return picture + (gray[..., None] - picture) * share


# --- other scores, to compare with


def laplacian_variance(picture: Picture) -> float:
    """What is most often used for sharpness."""
    from skimage.filters import laplace

    return float(laplace(picture @ np.array([0.299, 0.587, 0.114], np.float32)).var())


def no_blur_effect(picture: Picture) -> float:
    """Crété and others, The blur effect (2007), as scikit-image computes it."""
    from skimage.measure import blur_effect

    return 1 - float(blur_effect(picture, channel_axis=-1))


def quality(name: str) -> Callable[[Picture], float]:
    """One of our scores by its name."""
    return lambda picture: measure_quality(picture).named()[name]


@dataclass(frozen=True)
class Series:
    """A row of the table: a score, how pictures are degraded, and in what steps, the best first. Where `falls`, a
    greater number is a better picture."""

    score: str
    by: str
    measure: Callable[[Picture], float]
    degrade: Degrade
    steps: tuple[float, ...]
    falls: bool = False
    color_only: bool = False


BLUR, JPEG = (0, 0.5, 1, 1.5, 2, 3, 4), (100, 90, 75, 60, 40, 25, 15, 8)
SERIES = (
    Series("sharpness", "blur", quality("sharpness"), blurred, BLUR),
    Series("artifact_score", "JPEG", quality("artifact_score"), compressed, JPEG, falls=True),
    Series(
        "artifact_score", "banding", quality("artifact_score"), posterized, (256, 128, 64, 32, 16, 8, 4), falls=True
    ),
    Series("artifact_score", "noise", quality("artifact_score"), grained, (0, 2, 4, 8, 16, 32)),
    Series("color_diversity", "fading", quality("color_diversity"), faded, (0, 0.2, 0.4, 0.6, 0.8, 1), color_only=True),
    Series("variance of the Laplacian", "blur", laplacian_variance, blurred, BLUR),
    Series("1 - blur effect", "blur", no_blur_effect, blurred, BLUR),
)


@dataclass(frozen=True)
class Row:
    """Spearman's rank correlations of a score with the quality that is left: over all pictures' values together, over
    those of a group, and the median and least of the pictures by themselves."""

    score: str
    by: str
    pooled: float
    groups: dict[str, float]
    each: float
    least: float


def correlate(series: Series, groups: Mapping[str, Mapping[str, Picture]]) -> Row:
    """Degrade every picture by every step, score it, and compare."""
    from scipy.stats import spearmanr

    left = np.array(series.steps) * (1 if series.falls else -1)
    scores = {
        name: [
            [series.measure(rounded(series.degrade(picture, step))) for step in series.steps]
            for key, picture in pictures.items()
            if not (series.color_only and key in GRAY)
        ]
        for name, pictures in groups.items()
    }

    def correlation(values: Sequence[Sequence[float]]) -> float:
        return float(spearmanr(np.array(values).ravel(), np.tile(left, len(values))).statistic)

    every = [values for part in scores.values() for values in part]
    alone = [correlation([values]) for values in every if min(values) < max(values)]
    by_group = {name: correlation(values) for name, values in scores.items()}
    return Row(series.score, series.by, correlation(every), by_group, float(np.median(alone)), min(alone))


# --- the gate


@dataclass(frozen=True)
class Gated:
    """Of pictures of which a third were degraded: how many of both sorts there were, and how many the gate kept."""

    score: str
    by: str
    threshold: float
    whole: int
    whole_kept: int
    degraded: int
    degraded_kept: int


DAMAGES: dict[str, tuple[str, Degrade, float]] = {
    "blur of 3 pixels": ("sharpness", blurred, 3),
    "JPEG of quality 10": ("artifact_score", compressed, 10),
    "banding to 6 levels": ("artifact_score", posterized, 6),
    "noise of 24 levels": ("artifact_score", grained, 24),
}


def gate(by: str, pictures: Sequence[Picture]) -> Gated:
    """Degrade every third picture and let the gate decide about each.

    Its threshold comes from other pictures, a quarter of all: halfway between their scores whole and degraded.
    """
    name, degrade, step = DAMAGES[by]
    score = quality(name)
    known, others = pictures[::4], [picture for n, picture in enumerate(pictures) if n % 4]
    whole, damaged = (
        float(np.mean([score(rounded(degrade(picture, step)) if bad else picture) for picture in known]))
        for bad in (False, True)
    )
    threshold, kept = (whole + damaged) / 2, {False: 0, True: 0}
    for number, picture in enumerate(others):
        bad = number % 3 == 0
        shown = torch.tensor(rounded(degrade(picture, step)) if bad else picture)
        passed = quality_gate(
            lambda _: shown,  # noqa: B023
            threshold=threshold,
            attempts=1,
            score=lambda pictures: [score(one.numpy()) for one in pictures],
        ).passed
        kept[bad] += passed
    bad_ones = len(range(0, len(others), 3))
    return Gated(name, by, threshold, len(others) - bad_ones, kept[False], bad_ones, kept[True])


def pieces(pictures: Mapping[str, Picture], side: int = 160) -> list[Picture]:
    """Three pieces of every picture that is large enough for them; smaller ones whole."""
    cut = []
    for picture in pictures.values():
        height, width = picture.shape[:2]
        places = ((40, 60), (100, 200), (120, 100))
        fits = [(y, x) for y, x in places if y + side <= height and x + side <= width]
        cut += [picture[y : y + side, x : x + side] for y, x in fits] or [picture]
    return cut


def gate_table(rows: Sequence[Gated]) -> str:
    """Markdown."""
    lines = [
        "| degraded by | score | threshold | whole ones kept | degraded ones kept |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        kept = f"{row.whole_kept} of {row.whole} | {row.degraded_kept} of {row.degraded}"
        lines.append(f"| {row.by} | {row.score} | {row.threshold:.2f} | {kept} |")
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    groups = list(rows[0].groups)
    lines = [
        "| score | degraded by | pooled | " + " | ".join(groups) + " | one picture, median | least |",
        "| --- | --- |" + " ---: |" * (len(groups) + 3),
    ]
    for row in rows:
        numbers = row.pooled, *row.groups.values(), row.each, row.least
        lines.append(f"| {row.score} | {row.by} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help='a folder or "tiny"')
    parser.add_argument("--count", type=int, default=20, help="pictures that the model draws")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    where: dict[str, Any] = context(torch.device("cpu"))
    for name, text in where.items():
        print(f"{name:10} {text}")
    pipeline = NextStepPipeline.from_pretrained(arguments.model, dtype=torch.float32)
    groups = {"photographs": photographs(), "drawn": drawn(pipeline, arguments.count)}
    rows = [correlate(series, groups) for series in SERIES]
    print(table(rows))
    every = pieces(groups["photographs"]) + pieces(groups["drawn"])
    gates = [gate(by, every) for by in DAMAGES]
    print(f"\n{gate_table(gates)}")
    if arguments.json:
        numbers = {"rows": [vars(row) for row in rows], "gates": [vars(row) for row in gates]}
        arguments.json.write_text(json.dumps(where | numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
