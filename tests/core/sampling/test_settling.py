"""Tokens that end when they are settled, on densities whose flow is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nextstep_core.sampling.settling import until_settled
from nextstep_core.sampling.solvers import ETA, SAMPLERS, Velocity
from nextstep_core.sampling.updates import follow

DIM = 64


def toward(mean: Tensor, spread: Tensor, times: list[float], seen: list[int]) -> Velocity:
    """The flow from noise to a normal density, and which times it was asked for."""

    def velocity(x: Tensor, i: int) -> Tensor:
        seen.append(i)
        t = times[i]
        variance = (1 - t) ** 2 + (t * spread) ** 2
        token = mean + t * spread**2 / variance * (x - t * mean)  # the mean of what it may become
        return (token - x) / (1 - t)

    return velocity


def drawn(name: str, spread: float | list[float], steps: int = 28) -> tuple[Tensor, Tensor, Tensor, int]:
    """Tokens drawn to the end, and until they are settled; their mean; and the calls of the second."""
    sampler, seen = SAMPLERS[name], []
    times, rows = sampler.grid(steps, 1.0), torch.tensor(spread).reshape(-1, 1)
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(len(rows), DIM, generator=generator)
    noise = torch.randn(sampler.noise_count(steps), len(rows), DIM, generator=generator)
    whole = sampler.integrate(toward(mean, rows, times, []), times, noise, ETA)
    token = until_settled(follow(sampler, times), toward(mean, rows, times, seen), noise, times)
    return whole, token, mean, len(seen)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_can_be_one_thing_only_is_drawn_in_two_calls(name: str) -> None:
    _, token, mean, calls = drawn(name, 1e-4)
    assert calls == 2 and far(token, mean) < 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_may_be_many_things_takes_all_its_steps(name: str) -> None:
    """Where the first steps hardly move, because nothing is seen through the noise yet, is no reason to end."""
    whole, token, mean, calls = drawn(name, 1.0)
    assert calls > SAMPLERS[name].calls(28) / 2
    assert far(token, whole) < 0.25 < 0.8 < far(token, mean)


@pytest.mark.parametrize("name", ["score-sde-1.0", "flow-ode", "flow-heun"])
def test_what_is_given_up_is_little(name: str) -> None:
    for spread in (0.1, 0.3, 0.6):
        whole, token, _, _ = drawn(name, spread)
        assert far(token, whole) <= 0.3


def test_rows_do_not_depend_on_each_other() -> None:
    sampler = SAMPLERS["flow-ode"]
    _, together, _, _ = drawn("flow-ode", [0.2, 1.0])
    times, generator = sampler.grid(28, 1.0), torch.Generator().manual_seed(0)
    mean = torch.randn(2, DIM, generator=generator)
    noise = torch.randn(1, 2, DIM, generator=generator)
    for row, spread in enumerate((0.2, 1.0)):
        one = slice(row, row + 1)
        velocity = toward(mean[one], torch.tensor([[spread]]), times, [])
        alone = until_settled(follow(sampler, times), velocity, noise[:, one], times)
        torch.testing.assert_close(together[one], alone)
