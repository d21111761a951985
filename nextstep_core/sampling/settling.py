"""Tokens that are finished as soon as little is left to decide: the steps that remain are taken as one.

A velocity v at time t tells where a token is heading: x + (1 - t) v is the mean of all that it may still become. Of a
token that may still differ by s, this mean moves by about s² while t / (1 - t) grows by one, since the noise hides that
much less of it; where it hardly moves, all later velocities would agree with this one. (FlowCast, arXiv 2602.01329,
checks velocities against each other too.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .solvers import Velocity

SPREAD = 0.25  # how much a token may still differ, by the root of the mean square of its numbers, to be finished


class _AllSettled(Exception):
    """Ends a solver, which knows of no end but its last time."""


def until_settled(integrate: Callable[[Velocity], Tensor], velocity: Velocity, times: list[float]) -> Tensor:
    """What `integrate` makes of the velocity at these times, or, for each row that is settled earlier, where it is
    heading then. Rows do not depend on each other."""
    token = heading = settled = None
    before = 0.0

    def watched(x: Tensor, i: int) -> Tensor:
        nonlocal token, heading, settled, before
        v, signal = velocity(x, i), times[i] / (1 - times[i])
        ahead = x + (1 - times[i]) * v
        if token is None or heading is None or settled is None:
            token, settled = ahead, torch.zeros_like(ahead[..., :1], dtype=torch.bool)
        elif signal > before:
            moved = (ahead - heading).square().mean(dim=-1, keepdim=True).sqrt()
            now = moved <= SPREAD**2 * (signal - before)
            token, settled = torch.where(now & ~settled, ahead, token), settled | now
            if bool(settled.all()):
                raise _AllSettled
        heading, before = ahead, signal
        return v

    try:
        last = integrate(watched)
    except _AllSettled:
        assert token is not None
        return token
    return last if token is None or settled is None else torch.where(settled, token, last)
