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
    noise = torch.randn(sampler.noise_count(steps), 1, 64, generator=torch.Generator().manual_seed(0))
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
    noise = torch.randn(sampler.noise_count(6), 1, 64, generator=torch.Generator().manual_seed(0))
    times = sampler.grid(6, 1.0)
    run = lambda n: sampler.integrate(lambda x, i: 0.1 * x, times, n, ETA)  # noqa: E731
    plain = run(noise)
    for k in range(len(noise)):
        bumped = noise.clone()
        bumped[k] += 1
        changed = not torch.equal(run(bumped), plain)
        # flow-cps adds no noise where it arrives at t = 1
        assert changed or (name == "flow-cps" and k == len(noise) - 1)


# Not flow-cps, which keeps coefficients and not marginals; score-sde-1.0 only unshifted, since its last step is always
# 0.04 long, wherever a shifted grid ends.
KEEPS_MARGINALS = [
    (name, shift)
    for name in SAMPLERS
    for shift in (1.0, 2.0)
    if name != "flow-cps" and (name, shift) != ("score-sde-1.0", 2.0)
]


@pytest.mark.parametrize(("name", "shift"), KEEPS_MARGINALS)
def test_a_gaussian_stays_the_gaussian_that_it_should_be(name: str, shift: float) -> None:
    """For data N(1.5, 0.5^2) the velocity is known; noise and its drift correction must cancel in the marginals."""
    mean, deviation, steps = 1.5, 0.5, 250
    sampler = SAMPLERS[name]
    times = sampler.grid(steps, shift)
    noise = torch.randn(sampler.noise_count(steps), 20_000, 1, generator=torch.Generator().manual_seed(0))

    def velocity(x: torch.Tensor, i: int) -> torch.Tensor:
        t = times[i]
        variance = (t * deviation) ** 2 + (1 - t) ** 2
        return mean + (t * deviation**2 - (1 - t)) / variance * (x - t * mean)

    out = sampler.integrate(velocity, times, noise, ETA)
    assert out.mean().item() == pytest.approx(mean, abs=0.03)
    assert out.std().item() == pytest.approx(deviation, abs=0.03)


def test_flow_cps_by_hand() -> None:
    """One step to t = 0.5 with v = 0 and x = 1: estimates are x0 = x1 = 1, fresh noise has the share sin^2 of 0.5."""
    sampler = SAMPLERS["flow-cps"]
    noise = torch.tensor([[[1.0]], [[2.0]], [[0.0]]])
    seen = []
    sampler.integrate(lambda x, i: seen.append(x.item()) or torch.zeros_like(x), [0.0, 0.5, 1.0], noise, 1 / 3)
    assert seen[1] == pytest.approx(math.sqrt(0.25 - 0.0625) * 1 + 0.5 * 1 + 0.25 * 2)


@pytest.mark.parametrize(("name", "order"), [("flow-ode", 1), ("flow-heun", 2), ("flow-multistep", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    """Halving the step divides the error by 2^order; dx/dt = cos(6 t) x has a closed form."""
    sampler, start = SAMPLERS[name], torch.ones(1, 1, 1, dtype=torch.float64)

    def error(steps: int) -> float:
        times = sampler.grid(steps, 1.0)
        end = sampler.integrate(lambda x, i: math.cos(6 * times[i]) * x, times, start, ETA)
        return abs(end.item() - math.exp(math.sin(6) / 6))

    assert error(80) / error(160) == pytest.approx(2**order, rel=0.2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_network_calls_are_as_stated(name: str) -> None:
    sampler, calls = SAMPLERS[name], []
    noise = torch.zeros(sampler.noise_count(6), 1, 64)
    sampler.integrate(lambda x, i: calls.append(i) or x, sampler.grid(6, 1.0), noise, ETA)
    assert len(calls) == sampler.calls(6)


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
