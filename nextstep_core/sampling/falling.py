"""How many flow steps each token takes: the same for all, or fewer for later ones, which see most of the picture and
have less to decide (DiSA, arXiv 2505.20297).

A token with fewer steps walks over a part of the times of one with all of them, and each of its longer steps takes the
noise of those that it stands for: the same path of noise, seen more coarsely. So pictures stay comparable, and no time
is new to the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LEVELS = 8  # counts of steps in one picture: few, since a token's work is captured for each of them
LEAST = 0.4  # of the steps, what the last tokens take

CONSTANT, CHECKED = "constant", "checked"
# From 1 at the first token to 0 at the last, by the share of the picture that is done.
STEPS_SCHEDULES: dict[str, Callable[[float], float]] = {
    CONSTANT: lambda done: 1.0,
    CHECKED: lambda done: 1.0,  # at most: each token ends when it is settled
    "linear": lambda done: 1 - done,
    "square": lambda done: (1 - done) ** 2,
}


def step_counts(schedule: str, steps: int, least: int, total: int) -> list[int]:
    """The flow steps of each of `total` tokens: `steps` for the first, and never under `least`."""
    fall, lowest = STEPS_SCHEDULES[schedule], min(steps, max(least, round(LEAST * steps)))
    last = min(LEVELS, total) - 1
    levels = [n * (last + 1) // total for n in range(total)]
    return [round(lowest + (steps - lowest) * fall(level / last if last else 0.0)) for level in levels]


def part_of(points: int, fewer: int) -> list[int]:
    """`fewer` of so many points, as even as can be, with the first and the last."""
    return [round(n * (points - 1) / (fewer - 1)) for n in range(fewer)] if fewer > 1 else [0]


def merging(times: Sequence[float], part: Sequence[int], count: int) -> Tensor:
    """(fewer, count): how much of each of the `count` noises of a token enters those of the steps between the times of
    a `part`. The first is where the token begins; each other one belongs to a step, and weighs as it is long."""
    weights = torch.zeros(1 if count == 1 else len(part), count)
    weights[0, 0] = 1
    for row, (start, stop) in enumerate(zip(part, part[1:]), start=1):
        if count > 1:
            lengths = [times[k + 1] - times[k] for k in range(start, stop)]
            weights[row, start + 1 : stop + 1] = torch.tensor(lengths).div(sum(lengths)).sqrt()
    return weights
