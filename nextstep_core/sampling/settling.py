"""Tokens that are finished as soon as little is left to decide: the steps that remain are taken as one.

A velocity v at time t tells where a token is heading: x + (1 - t) v is the mean of all that it may still become. Of a
token that may still differ by s, this mean moves by about s² while t / (1 - t) grows by one, since the noise hides that
much less of it; where it hardly moves, all later velocities would agree with this one. (FlowCast, arXiv 2602.01329,
checks velocities against each other too.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .solvers import Velocity
from .updates import Updates

SPREAD = 0.25  # how much a token may still differ, by the root of the mean square of its numbers, to be finished


def until_settled(updates: Updates, velocity: Velocity, noise: Tensor, times: list[float]) -> Tensor:
    """What a solver makes of the velocity at these times, or, for each row that is settled earlier, where it is heading
    then. Rows do not depend on each other."""
    settling = Settling(times)
    last = updates.run(velocity, noise, settling)
    return torch.where(settling.settled, settling.token, last)


class Settling:
    """Which rows are settled, and the tokens that they have become; rows (M, token_dim)."""

    settled: Tensor
    token: Tensor

    def __init__(self, times: list[float]) -> None:
        self._times, self._before = times, 0.0
        self._heading: Tensor | None = None

    def __call__(self, x: Tensor, velocity: Tensor, time: int) -> Tensor | None:
        """The tokens, once all rows are settled; `velocity` is that of x at times[time]."""
        t = self._times[time]
        ahead, signal = x + (1 - t) * velocity, t / (1 - t)
        heading, before = self._heading, self._before
        self._heading, self._before = ahead, signal
        if heading is None:
            self.token, self.settled = ahead, torch.zeros_like(ahead[..., :1], dtype=torch.bool)
        elif signal > before:
            moved = (ahead - heading).square().mean(dim=-1, keepdim=True).sqrt()
            now = moved <= SPREAD**2 * (signal - before)
            self.token = torch.where(now & ~self.settled, ahead, self.token)
            self.settled = self.settled | now
            return self.token if bool(self.settled.all()) else None
        return None
