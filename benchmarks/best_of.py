"""Whether the best of several is right more often than one attempt, and what dropping the worse half on the way saves.

python -m benchmarks.best_of
python -m benchmarks.best_of --count 100 --candidates 8 --model FOLDER --json best_of.json

On prompts of the embedded model that one attempt often gets wrong. The scene reader judges the finished pictures alone.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import context
from nextstep_core import NextStepPipeline
from nextstep_core.decoding.pruning import Pruning
from nextstep_core.studio.selection import Score, agreement, best_of, seed_of, total_quality
from tests.scene_reader import read_scene, shows
from training.evaluate import LARGE, held_out_singles
from training.scenes import SQUARE, Scene, caption, sample_pair

ONE, ALL, PRUNED = "one attempt", "best of {n}", "best of {n}, pruned"
SCORES: dict[str, Score] = {"agreement": agreement, "total quality": total_quality}
JUDGE = "the judge itself, an upper bound"


@dataclass(frozen=True)
class Case:
    """Prompts of one kind with what they should show, the pictures' size, and settings under which some go wrong."""

    name: str
    prompts: list[tuple[str, Scene]]
    canvas: tuple[int, int]
    settings: dict[str, Any]


@dataclass
class Tally:
    """How often a way was right, and its seconds of computing."""

    right: list[bool] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def cases(count: int) -> list[Case]:
    """So many prompts of each kind."""
    rng = random.Random("best of")
    pairs = [(caption(scene), scene) for scene in (sample_pair(rng, held_out=True) for _ in range(count))]
    singles, large = (
        [(text, scene) for text, scene, _ in held_out_singles(count, 3, canvas)] for canvas in (SQUARE, LARGE)
    )
    return [
        Case("two objects, 6 steps", pairs, SQUARE, {"steps": 6}),
        Case("one object, 5 steps", singles, SQUARE, {"steps": 5}),
        Case("one object, 128x128", large, LARGE, {}),
    ]


def is_right(picture: Tensor, scene: Scene) -> bool:
    """The judge."""
    return shows(read_scene((picture.numpy() * 255).round().astype(np.uint8)), scene)


def run(pipeline: NextStepPipeline, case: Case, candidates: int) -> dict[tuple[str, str], Tally]:
    """Every way on every prompt, by (way, score). All start from the same seeds, so their pictures are the same."""
    width, height = case.canvas
    tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)

    def add(way: str, score: str, picture: Tensor, scene: Scene, seconds: float) -> None:
        tally = tallies[way.format(n=candidates), score]
        tally.right.append(is_right(picture, scene))
        tally.seconds.append(seconds)

    for number, (text, scene) in enumerate(case.prompts):

        def draw(seeds: list[int], prune: Pruning | None, text: str = text) -> Tensor:
            prompts = [text] * len(seeds)
            return pipeline.generate(
                prompts, width=width, height=height, seed=seeds, prune=prune, **case.settings
            ).images

        seconds, one = timed(lambda: draw([seed_of(number, 0)], None))  # noqa: B023
        add(ONE, "", one[0], scene, seconds)
        seconds, whole = timed(lambda: draw([seed_of(number, n) for n in range(candidates)], None))  # noqa: B023
        judged = lambda pictures: [float(is_right(picture, scene)) for picture in pictures]  # noqa: B023, E731
        for name, score in {**SCORES, JUDGE: judged}.items():
            options: dict[str, Any] = {"candidates": candidates, "score": score}
            scoring, kept = timed(lambda: best_of(lambda *_: whole, number, kept=1.0, **options))  # noqa: B023
            add(ALL, name, kept.picture, scene, seconds + scoring)
            if name != JUDGE:
                took, kept = timed(lambda: best_of(draw, number, **options))  # noqa: B023
                add(PRUNED, name, kept.picture, scene, took)
    return tallies


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of this process's computing, which other work on the machine does not lengthen, and what came of it."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def table(case: Case, tallies: dict[tuple[str, str], Tally]) -> str:
    """Markdown."""
    lines = [
        f"| {case.name} (n={len(case.prompts)}) | score | right | seconds |",
        "| --- | --- | ---: | ---: |",
    ]
    for (way, score), tally in tallies.items():
        lines.append(f"| {way} | {score} | {np.mean(tally.right):.0%} | {np.mean(tally.seconds):.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help='a folder or "tiny"')
    parser.add_argument("--count", type=int, default=40, help="prompts of each kind")
    parser.add_argument("--candidates", type=int, default=6)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    where: dict[str, Any] = context(torch.device("cpu"))
    for name, text in where.items():
        print(f"{name:10} {text}")
    pipeline = NextStepPipeline.from_pretrained(arguments.model, dtype=torch.float32)
    numbers = {}
    for case in cases(arguments.count):
        tallies = run(pipeline, case, arguments.candidates)
        print(f"\n{table(case, tallies)}", flush=True)
        numbers[case.name] = {
            f"{way} {score}".strip(): {"right": float(np.mean(t.right)), "seconds": float(np.mean(t.seconds))}
            for (way, score), t in tallies.items()
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(where | {"cases": numbers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
