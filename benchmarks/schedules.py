"""What schedules of flow steps save and cost on the embedded model: network calls per token, and what is drawn right.

python -m benchmarks.schedules --count 100
python -m benchmarks.schedules --count 100 --sampler score-sde-1.1 --steps 28 --schedule constant --schedule checked
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables import table
from nextstep_core import NextStepPipeline
from nextstep_core.sampling.falling import CONSTANT, STEPS_SCHEDULES
from nextstep_core.sampling.solvers import SAMPLERS
from tests.window_runs import distance
from training.evaluate import held_out_singles, measure_edits, measure_pairs, measure_singles
from training.scenes import CANVASES, SQUARE

LARGEST = CANVASES[-1]
ALONE = 6  # pictures of a size that are drawn one by one, where each has calls of its own
TITLES = [
    "schedule", ">calls per token, 64x64", ">128x128", ">one object right", ">edits", ">two objects", ">128x128",
    ">distance, median",
]  # fmt: skip


@dataclass(frozen=True)
class Alone:
    """Pictures drawn one by one: the tokens of each, and the network calls per token of all."""

    tokens: list[Tensor]
    calls: float


def alone(pipe: NextStepPipeline, canvas: tuple[int, int], settings: dict[str, Any]) -> Alone:
    """Held-out pictures of one size, each by itself."""
    head, calls, drawn = pipe.engine.model.head, 0, []
    velocity = head.velocity

    def counted(*inputs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return velocity(*inputs)

    head.velocity = counted
    try:
        for seed, (text, _, _) in enumerate(held_out_singles(ALONE, 7, canvas)):
            drawn.append(pipe.generate(text, width=canvas[0], height=canvas[1], seed=seed, **settings).tokens)
    finally:
        del head.velocity
    return Alone(drawn, calls / sum(tokens.shape[1] for tokens in drawn))


def rows(pipe: NextStepPipeline, schedules: list[str], count: int, settings: dict[str, Any]) -> Iterator[list[str]]:
    """A row of the table for each schedule; the distance is from the tokens with every step."""
    wanted = [alone(pipe, canvas, settings | {"steps_schedule": CONSTANT}) for canvas in (SQUARE, LARGEST)]
    for name in schedules:
        chosen = settings | {"steps_schedule": name}
        found = [alone(pipe, canvas, chosen) for canvas in (SQUARE, LARGEST)]
        pairs = [pair for a, b in zip(found, wanted) for pair in zip(a.tokens, b.tokens)]
        shares = (
            measure_singles(pipe, count, **chosen),
            measure_edits(pipe, max(1, count // 2), **chosen),
            measure_pairs(pipe, max(1, count // 2), **chosen),
            measure_singles(pipe, max(1, count // 4), canvas=LARGEST, **chosen),
        )
        yield [
            name,
            *(f"{one.calls:.1f}" for one in found),
            *(f"{score.share('all'):.0%}" for score in shares),
            f"{median(distance(*pair) for pair in pairs):.2f}",
        ]


def main() -> None:
    """Print the table, a row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="tiny", help='a folder or "tiny"')
    parser.add_argument("--count", type=int, default=100, help="prompts with one object; half as many of other kinds")
    parser.add_argument("--steps", type=int, help="of the first token; default: what the checkpoint recommends")
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: what the checkpoint recommends")
    parser.add_argument("--schedule", action="append", choices=STEPS_SCHEDULES, help="default: all of them")
    options = parser.parse_args()
    pipe = NextStepPipeline.from_pretrained(options.checkpoint, dtype=torch.float32)
    settings = {"steps": options.steps, "sampler": options.sampler}
    chosen = pipe.engine.recommended().override(**settings)
    print(f"torch {torch.__version__}, float32, {chosen.sampler}, {chosen.steps} steps, {options.count} prompts")
    started, found = time.monotonic(), []
    for row in rows(pipe, options.schedule or list(STEPS_SCHEDULES), options.count, settings):
        found.append(row)
        print(" ".join(row), f"({time.monotonic() - started:.0f} s)", flush=True)
    print(f"\n{table(TITLES, found)}")


if __name__ == "__main__":
    main()
