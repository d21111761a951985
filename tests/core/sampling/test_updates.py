"""A solver that was followed once does what the solver does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nextstep_core.sampling.solvers import ETA, SAMPLERS
from nextstep_core.sampling.updates import Term, follow


@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("steps", [2, 3, 28])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_token(name: str, steps: int, shift: float) -> None:
    sampler, generator = SAMPLERS[name], torch.Generator().manual_seed(steps)
    times = sampler.grid(steps, shift)
    noise = torch.randn(sampler.noise_count(steps), 3, 5, generator=generator, dtype=torch.float64)
    calls: list[int] = []

    def velocity(x: Tensor, i: int) -> Tensor:
        calls.append(i)
        return (2 * x).sin() + times[i] * x.flip(-1)

    plain = sampler.integrate(velocity, times, noise, ETA)
    asked, calls[:] = list(calls), []
    before = noise.clone()
    torch.testing.assert_close(follow(sampler, times).run(velocity, noise), plain, rtol=1e-9, atol=1e-9)
    assert calls == asked
    assert torch.equal(noise, before), "the noise is the caller's"


def test_eulers_step_by_hand() -> None:
    updates = follow(SAMPLERS["flow-ode"], [0.0, 0.25, 1.0])
    assert [call.state for call in updates.calls] == [
        (Term("noise", 0, 1.0),),
        (Term("state", 0, 1.0), Term("velocity", 0, 0.25)),
    ]
    assert updates.token == (Term("state", 1, 1.0), Term("velocity", 1, 0.75))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_needs_few_tensors(name: str) -> None:
    updates = follow(SAMPLERS[name], SAMPLERS[name].grid(28, 1.0))
    assert max(len(call.state) for call in updates.calls) <= 3
    assert len(updates.token) <= 3
