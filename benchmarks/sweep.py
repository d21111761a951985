"""Cost against picture size and batch, as numbers and as a plot."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nextstep_core.errors import NextStepError

from .timing import Case, measure, time_parts

SIDES = (256, 512, 768, 1024)
BATCHES = tuple(range(1, 9))
# Two hues and their tints, told apart by lightness as well as by color.
PARTS = {"prefill": "#7f7f7f", "transformer": "#1f5fa8", "head": "#e08214", "VAE": "#5aae61"}


def need_matplotlib() -> None:
    """NextStepError, before any long work, where the plot could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise NextStepError("--sweep draws with matplotlib. Install it: pip install -r requirements-dev.txt") from None


def seconds_by_part(case: Case, repeat: int, warmup: int, only: int | None) -> dict[str, float]:
    """Seconds per picture that each part takes, and tokens per second of all pictures together."""
    numbers = {name: values["median"] for name, values in measure(case, repeat, warmup, only).items()}
    total = case.tokens
    return {
        "prefill": numbers["prefill_position"] * case.prompt_length / case.batch,
        "transformer": numbers["transformer"] * (total - 1) / case.batch,
        "head": numbers["head"] * total / case.batch,
        "VAE": numbers["vae_picture"],
        "picture": numbers["picture"],
        "tokens_per_second": numbers["tokens_per_second"],
    }


def sweep(case: Case, repeat: int, warmup: int, only: int | None, tell: Callable[[str], None]) -> dict[str, Any]:
    """Every side in SIDES with one picture, then every batch in BATCHES at the case's own size."""
    results: dict[str, Any] = {"size": {}, "batch": {}, "batch_size": f"{case.width}x{case.height}"}
    cases = [("size", side, replace(case, width=side, height=side, batch=1)) for side in SIDES]
    cases += [("batch", batch, replace(case, batch=batch)) for batch in BATCHES]
    for axis, value, one in cases:
        time_parts(one, 1)  # the first use of every shape builds its programs
        results[axis][value] = seconds_by_part(one, repeat, warmup, only)
        tell(f"{axis} {value}: {results[axis][value]['picture']:.2f} s a picture")
    results["growth"] = growth(results)
    return results


def growth(results: dict[str, Any]) -> str:
    """One sentence on what grows how."""
    first, last = results["size"][SIDES[0]], results["size"][SIDES[-1]]
    one, many = results["batch"][BATCHES[0]], results["batch"][BATCHES[-1]]
    tokens, times = (SIDES[-1] / SIDES[0]) ** 2, {part: last[part] / first[part] for part in first}
    return (
        f"From {SIDES[0]} to {SIDES[-1]} pixels a side there are {tokens:g} times the tokens, and a picture takes "
        f"{times['picture']:.1f} times as long: the head {times['head']:.1f} times, the transformer, whose KV cache "
        f"grows, {times['transformer']:.1f} times, and the VAE {times['VAE']:.1f} times; of {BATCHES[-1]} pictures "
        f"drawn together each takes {many['picture'] / one['picture']:.2f} of the time of one alone."
    )


def plot(results: dict[str, Any], title: str, path: Path) -> None:
    """Two panels of seconds per picture by part: against the size, and against the batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    labels = {"size": "picture, pixels a side (batch 1)", "batch": f"pictures at once ({results['batch_size']})"}
    for axes, (axis, label) in zip(panels, labels.items()):
        rows = results[axis]
        places = range(len(rows))
        below = [0.0] * len(rows)
        for part, color in PARTS.items():
            heights = [row[part] for row in rows.values()]
            axes.bar(places, heights, bottom=below, color=color, label=part, width=0.7)
            below = [a + b for a, b in zip(below, heights)]
        for place, total in zip(places, below):
            axes.annotate(short(total), (place, total), ha="center", va="bottom", fontsize=8)
        axes.set_xticks(places, [str(value) for value in rows])
        axes.set_xlabel(label)
        axes.margins(y=0.1)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds a picture")
    panels[0].legend(frameon=False, reverse=True)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def short(seconds: float) -> str:
    """Seconds in three digits."""
    return f"{seconds:.{max(0, 2 - math.floor(math.log10(max(seconds, 1e-9))))}f}"
