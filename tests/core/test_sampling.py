"""Samplers on velocity fields whose answer is known, grids and guidance by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nextstep_core.sampling.guidance import SCHEDULES, guide
from nextstep_core.sampling.solvers import ETA, SAMPLERS, normalize_token, shift_times, unit_grid

TARGET = torch.linspace(-2, 2, 64)[None]


def integrate(name: str, steps: int, shift: float = 1.0) -> torch.Tensor:
    """Run a sampler on the straight field towards one point, v = (target - x) / (1 - t)."""
    sampler = SAMPLERS[name]
    times = sampler.grid(steps, shift)
    noise = torch.randn(sampler.draws(steps), 1, 64, generator=torch.Generator().manual_seed(0))
    return sampler.integrate(lambda x, i: (TARGET - x) / (1 - times[i]), times, noise, ETA)


@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("name", ["flow-ode", "flow-cps"])
def test_a_straight_field_is_hit_exactly(name: str, shift: float) -> None:
    assert (integrate(name, 7, shift) - TARGET).abs().max() <= 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_ends_near_the_only_point(name: str) -> None:
    """What is left is the sampler's own last step and noise, and it shrinks with more steps."""
    coarse, fine = ((integrate(name, steps) - TARGET).pow(2).mean().sqrt().item() for steps in (10, 200))
    assert fine < 0.35
    assert fine <= coarse + 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_are_all_used_and_no_more(name: str) -> None:
    sampler = SAMPLERS[name]
    noise = torch.randn(sampler.draws(6), 1, 64, generator=torch.Generator().manual_seed(0))
    times = sampler.grid(6, 1.0)
    run = lambda n: sampler.integrate(lambda x, i: 0.1 * x, times, n, ETA)  # noqa: E731
    plain = run(noise)
    for k in range(len(noise)):
        bumped = noise.clone()
        bumped[k] += 1
        changed = not torch.equal(run(bumped), plain)
        # flow-cps adds no noise where it arrives at t = 1
        assert changed or (name == "flow-cps" and k == len(noise) - 1)


def test_times_by_hand() -> None:
    assert unit_grid(4, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert shift_times([0.5], 3.0) == [0.25]
    assert SAMPLERS["score-sde-1.0"].grid(3, 1.0) == pytest.approx([0, 0.48, 0.96])


def test_guidance_by_hand() -> None:
    v = torch.tensor([[1.0], [2.0], [4.0]])
    assert guide(v[:1], 1, 7.5, 2.0).item() == 1
    assert guide(v[:2], 2, 3.0, 2.0).item() == 2 + 3 * (1 - 2)
    assert guide(v, 3, 3.0, 2.0).item() == 4 + 2 * (2 - 4) + 3 * (1 - 2)


def test_schedules_by_hand() -> None:
    assert [SCHEDULES["linear"](5, n, 4) for n in range(4)] == [5, 4, 3, 2]
    assert [SCHEDULES["linear-rise"](5, n, 4) for n in range(4)] == [2.5, 2.5, 3, 4]
    assert SCHEDULES["constant"](5, 3, 4) == 5


def test_normalized_tokens() -> None:
    token = normalize_token(torch.randn(3, 64) * 5 + 2)
    assert token.mean(dim=-1).abs().max() < 1e-5
    assert math.isclose(token.pow(2).mean().item(), 1, abs_tol=1e-4)
