"""Tokens per read of the weights with lookahead, and how close they stay: by window, size, tolerance and settings.

python -m benchmarks.lookahead --count 12 --plot docs/lookahead.png
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.first_guesses import FIRST_GUESSES
from benchmarks.sweep import need_matplotlib
from benchmarks.tables import table
from nextstep_core import NextStepPipeline
from nextstep_core.decoding.job import Job
from nextstep_core.decoding.lookahead import MOST, SIZES, TOLERANCES, Windows, ahead
from nextstep_core.decoding.window_choice import WindowChoice
from nextstep_core.request.layout import Caption
from tests.window_runs import CPU, begun, distance, plainly
from training.evaluate import held_out_singles
from training.scenes import CANVASES

EXACT = TOLERANCES["exact"]
SWEPT = (1e-5, 1e-4, 3e-4, 1e-3, 1e-2, 5e-2, 1e-1)
SETTINGS: dict[str, dict[str, Any]] = {
    "recommended": {},
    "cfg 1": {"cfg": 1.0},
    "cfg 8": {"cfg": 8.0},
    "score-sde-1.1": {"sampler": "score-sde-1.1"},
    "flow-ode": {"sampler": "flow-ode"},
    "flow-cps": {"sampler": "flow-cps"},
    "8 steps": {"steps": 8},
}


@dataclass
class Tally:
    """What came of some pictures: their tokens, the reads for them, and each one's distance from the plain loop's."""

    tokens: int = 0
    reads: int = 0
    distances: list[float] = field(default_factory=list)
    right: list[int] = field(default_factory=lambda: [0] * MOST)  # by place in the window
    examined: list[int] = field(default_factory=lambda: [0] * MOST)

    @property
    def at_once(self) -> float:
        """Tokens per read."""
        return self.tokens / self.reads

    def cells(self) -> tuple[str, str, str]:
        """Tokens per read, the median and the largest distance."""
        return f"{self.at_once:.2f}", f"{median(self.distances):.0e}", f"{max(self.distances):.0e}"


@torch.inference_mode()
def job_of(pipe: NextStepPipeline, text: str, canvas: tuple[int, int], seed: int, settings: dict[str, Any]) -> Job:
    """A picture of `canvas` (width, height) for one prompt."""
    engine = pipe.engine
    grid = engine.grid(canvas[1], canvas[0])
    return engine.make_job([Caption(text)], grid, engine.recommended().override(**settings), seed=seed)


@torch.inference_mode()
def solve(
    pipe: NextStepPipeline,
    job: Job,
    size: int,
    tolerance: float,
    wanted: Tensor,
    tally: Tally,
    kind: type[Windows] = Windows,
) -> None:
    """Draw a picture with windows of one size, and count."""
    windows = begun(pipe, job, kind=kind)
    before = windows.first
    for step in ahead(windows, WindowChoice({size: 1.0}), tolerance):
        for place in range(min(step.done - before, size - 1)):
            tally.examined[place] += 1
            tally.right[place] += place < step.done - before - 1
        before = step.done
    tally.tokens += job.total
    tally.reads += windows.reads
    tally.distances.append(distance(windows.run.tokens, wanted))


def tallied(
    pipe: NextStepPipeline,
    canvas: tuple[int, int],
    count: int,
    cases: dict[Any, tuple[int, float]],
    settings: dict[str, Any] | None = None,
) -> dict[Any, Tally]:
    """`count` held-out pictures of one size for every case, a window and a tolerance."""
    tallies = {case: Tally() for case in cases}
    for seed, (text, _, _) in enumerate(held_out_singles(count, 7, canvas)):
        wanted = plainly(pipe, job_of(pipe, text, canvas, seed, settings or {}))
        for case, (size, tolerance) in cases.items():
            solve(pipe, job_of(pipe, text, canvas, seed, settings or {}), size, tolerance, wanted, tallies[case])
    return tallies


def by_first_guess(pipe: NextStepPipeline, canvas: tuple[int, int], count: int) -> Iterator[tuple[str, ...]]:
    """Tokens per read, and distances, for what windows may hold at first."""
    tallies = {name: Tally() for name in FIRST_GUESSES}
    for seed, (text, _, _) in enumerate(held_out_singles(count, 7, canvas)):
        wanted = plainly(pipe, job_of(pipe, text, canvas, seed, {}))
        for name, kind in FIRST_GUESSES.items():
            solve(pipe, job_of(pipe, text, canvas, seed, {}), MOST // 2, EXACT, wanted, tallies[name], kind)
    return ((name, *tally.cells()) for name, tally in tallies.items())


def named(canvas: tuple[int, int]) -> str:
    """Width x height, and how many tokens that is."""
    return f"{canvas[0]}x{canvas[1]}, {canvas[0] * canvas[1] // 256} tokens"


def sections(pipe: NextStepPipeline, count: int, plot_to: Path | None) -> Iterator[str]:
    """The tables, one after another."""
    largest = CANVASES[-1]
    by_size = {canvas: tallied(pipe, canvas, count, {size: (size, EXACT) for size in SIZES}) for canvas in CANVASES}
    rows = [(named(c), *(f"{t.at_once:.2f}" for t in ts.values()), ts[MOST].cells()[2]) for c, ts in by_size.items()]
    titles = ["picture", *(f">window {size}" for size in SIZES), ">farthest"]
    yield f"Tokens per read, exact (tolerance {EXACT:g}), and the largest distance of all\n\n{table(titles, rows)}"
    if plot_to is not None:
        plot({canvas: {size: t.at_once for size, t in ts.items()} for canvas, ts in by_size.items()}, plot_to)
    swept = tallied(pipe, largest, count, {tolerance: (MOST, tolerance) for tolerance in SWEPT})
    rows = [(f"{tolerance:g}", *tally.cells()) for tolerance, tally in swept.items()]
    titles = [">tolerance", ">tokens per read", ">distance, median", ">largest"]
    yield f"By tolerance, {named(largest)}, window {MOST}\n\n{table(titles, rows)}"
    rows = []
    for name, settings in SETTINGS.items():
        tally = tallied(pipe, largest, count, {0: (MOST, EXACT)}, settings)[0]
        rows.append((name, *tally.cells()))
    yield f"By settings, {named(largest)}, exact\n\n{table(['settings', *titles[1:]], rows)}"
    tally = swept[EXACT]
    rows = [
        (place + 1, f"{tally.right[place] / tally.examined[place]:.0%}")
        for place in range(MOST)
        if tally.examined[place]
    ]
    yield f"Right guesses by place in the window, where all before were right\n\n{table(['>place', '>right'], rows)}"
    rows = list(by_first_guess(pipe, largest, count))
    yield f"By first guess, {named(largest)}, window {MOST // 2}, exact\n\n{table(['at first', *titles[1:]], rows)}"
    rows = [(mode, *timed(pipe, largest, count, mode)) for mode in ("off", "exact", "fast")]
    yield f"Time of a picture, {named(largest)}\n\n{table(['lookahead', '>seconds', '>tokens per read'], rows)}"


def timed(pipe: NextStepPipeline, canvas: tuple[int, int], count: int, mode: str) -> tuple[str, str]:
    """Median seconds of a picture without its VAE, and tokens per read; the first picture is not counted."""
    seconds, tokens, reads = [], 0, 0
    for seed, (text, _, _) in enumerate(held_out_singles(count + 1, 7, canvas)):
        job = job_of(pipe, text, canvas, seed, {"lookahead": mode})
        started = time.perf_counter()
        with torch.inference_mode():
            *_, progress = pipe.engine.decode(job, CPU, pipe.dtype)
        if seed:
            seconds.append(time.perf_counter() - started)
            tokens, reads = tokens + progress.step.sampled, reads + progress.step.reads
    return f"{median(seconds):.2f}", f"{tokens / reads:.2f}"


def plot(curves: dict[tuple[int, int], dict[int, float]], path: Path) -> None:
    """Tokens per read over the window, a line for each size."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for canvas, points in curves.items():
        axes.plot(list(points), list(points.values()), marker="o", label=named(canvas))
    axes.plot(SIZES, SIZES, color="gray", linestyle=":", label="all guesses right")
    axes.set(xscale="log", xticks=SIZES, xticklabels=SIZES, xlabel="window", ylabel="tokens per read of the weights")
    axes.set_ylim(0.9, 1.1 * max(max(points.values()) for points in curves.values()))
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="tiny", help='a folder or "tiny"')
    parser.add_argument("--count", type=int, default=12, help="pictures per cell")
    parser.add_argument("--plot", type=Path, help="write the plot here")
    options = parser.parse_args()
    if options.plot is not None:
        need_matplotlib()
    pipe = NextStepPipeline.from_pretrained(options.checkpoint, dtype=torch.float32)
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads, float32, {options.count} held-out prompts a cell")
    for section in sections(pipe, options.count, options.plot):
        print(f"\n{section}", flush=True)


if __name__ == "__main__":
    main()
