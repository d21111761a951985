"""One server, hundreds of runs of every kind: what it takes must not grow, and the last picture is the first.

    python -m tests.stress.soak --runs 500

Needs a ComfyUI (see scripts/hosts.sh) and Linux, which tells what a process takes.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.comfy_server import ComfyServer

from .server import MODELS, Usage, broken, edit, masked, stressed_server, text

GROWTH_MB = 20.0  # in the second half
EVERY = 5  # runs between two looks at the process


@dataclass
class Soak:
    """How runs ended, by kind, what the process took along the way, and whether the first picture came again."""

    ended: Counter[str] = field(default_factory=Counter)
    usage: list[Usage] = field(default_factory=list)
    same_picture: bool = False

    @property
    def growth(self) -> float:
        """Megabytes from the middle to the end: of the medians of ten looks, since a single one is by chance."""
        half = self.usage[len(self.usage) // 2 :]
        first, last = half[:10], half[-10:]
        return float(np.median([u.megabytes for u in last]) - np.median([u.megabytes for u in first]))

    @property
    def problems(self) -> list[str]:
        """What is not as promised."""
        half = self.usage[len(self.usage) // 2 :]
        found = [kind for kind in self.ended if kind.startswith("unexpected")]
        if self.growth >= GROWTH_MB:
            found.append(f"{self.growth:.1f} MB more at the end than in the middle")
        if half[-1].threads > half[0].threads or half[-1].files > half[0].files + 2:
            found.append(f"threads {half[0].threads} to {half[-1].threads}, files {half[0].files} to {half[-1].files}")
        if not self.same_picture:
            found.append("the last picture is not the first")
        return found


def picture(server: ComfyServer) -> np.ndarray:
    """The picture that is drawn first and last."""
    run = server.run(text(seed=1))
    if run.ended != "execution_success":
        raise RuntimeError(f"the first picture ended with {run.events[-1]}")
    return np.asarray(Image.open(server.images(run)[0]))


def one(server: ComfyServer, kind: str, seed: int) -> str:
    """A run of one kind; how it ended, as expected or not."""
    wanted, stop = "execution_success", None
    prompt = {
        "text": lambda: text(seed),
        "another model": lambda: text(seed, model=MODELS[1]),
        "batch": lambda: text(seed, batch=2),
        "edit": lambda: edit(seed),
        "mask": lambda: masked(seed),
        "interrupt": lambda: text(seed, size=256),
        "error": lambda: broken(seed),
        "free": lambda: text(seed),
    }[kind]()
    if kind == "interrupt":
        wanted, stop = "execution_interrupted", 1 + seed % 20
    if kind == "error":
        wanted = "execution_error"
    if kind == "free":
        server.call("/free", {"unload_models": True, "free_memory": True})
    ended = server.run(prompt, interrupt_at=stop).ended
    return kind if ended == wanted else f"unexpected: {kind} ended with {ended}"


KINDS = ("text", "another model", "batch", "edit", "mask", "interrupt", "error", "free")


def soak(runs: int, folder: Path, seed: int = 0, say: Callable[[str], None] = print) -> Soak:
    """Run them, of kinds and seeds drawn at random."""
    result, chosen = Soak(), random.Random(seed)
    with stressed_server(folder) as server:
        first = picture(server)
        for number in range(runs):
            result.ended[one(server, chosen.choice(KINDS), chosen.randrange(1 << 32))] += 1
            if number % EVERY == EVERY - 1:
                result.usage.append(Usage.of(server.pid))
                if number % (10 * EVERY) == 10 * EVERY - 1:
                    say(f"{number + 1} runs: {result.usage[-1]}")
        result.same_picture = np.array_equal(picture(server), first)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of kinds and seeds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(options.runs, Path(folder) / "base", options.seed)
    middle, last = result.usage[len(result.usage) // 2], result.usage[-1]
    print(", ".join(f"{count} {kind}" for kind, count in sorted(result.ended.items())))
    print(f"middle: {middle}; end: {last}; growth of medians {result.growth:.1f} MB")
    print("; ".join(result.problems) or "as promised: flat, and the last picture is the first")
    sys.exit(1 if result.problems else 0)


if __name__ == "__main__":
    main()
