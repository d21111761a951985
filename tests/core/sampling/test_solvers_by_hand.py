"""Every sampler's formula, written out once more for single numbers and shifted grids."""

from __future__ import annotations

import math

import pytest
import torch

from nextstep_core.sampling.guidance import guide
from nextstep_core.sampling.noise import NoiseStream
from nextstep_core.sampling.solvers import ETA, LAST_STEP, SAMPLERS

SHIFT = 2.0
NOISE = [0.7, -1.1, 0.4, 0.9, -0.3]


def velocity(x: float, t: float) -> float:
    return 0.6 * x - 0.5 + t


def run(name: str, times: list[float], eta: float = ETA) -> float:
    noise = torch.tensor(NOISE, dtype=torch.float64)[:, None, None]
    return SAMPLERS[name].integrate(lambda x, i: velocity(x, times[i]), times, noise, eta).item()


@pytest.fixture
def times() -> list[float]:
    return SAMPLERS["flow-sde"].grid(4, SHIFT)


def test_the_grid_by_hand(times: list[float]) -> None:
    assert times == pytest.approx([t / (2 - t) for t in (0, 0.25, 0.5, 0.75, 1)])
    held_out = SAMPLERS["score-sde-1.0"].grid(3, SHIFT)
    assert held_out == pytest.approx([t / (2 - t) for t in (0, 0.48, 0.96)])


def test_constants_are_the_published_ones() -> None:
    assert (ETA, LAST_STEP) == (0.8, 0.04)


def flow_ode(times: list[float], eta: float) -> float:
    x = NOISE[0]
    for t, t_next in zip(times, times[1:]):
        x += (t_next - t) * velocity(x, t)
    return x


def flow_sde(times: list[float], eta: float) -> float:
    """Mean toward the data with its correction, noise eta sqrt(sigma / (1 - sigma)) sqrt(dt); sigma 1 counts as the
    second-last grid time."""
    x = NOISE[0]
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        v, sigma, dt = velocity(x, t), 1 - t, t_next - t
        scale = eta * math.sqrt(sigma / (1 - (times[-2] if i == 0 else sigma)))
        x0, x1 = x - t * v, x + (1 - t) * v
        x = x0 * (1 - t_next) + x1 * t_next - scale**2 * dt / (2 * sigma) * x0 + scale * math.sqrt(dt) * NOISE[i + 1]
    return x


def flow_cps(times: list[float], eta: float) -> float:
    x = NOISE[0]
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        v, left = velocity(x, t), 1 - t_next
        fresh = left * math.sin(eta * math.pi / 2)
        x = (x - t * v) * math.sqrt(left**2 - fresh**2) + (x + (1 - t) * v) * t_next + fresh * NOISE[i + 1]
    return x


def score_sde(times: list[float], eta: float) -> float:
    x = NOISE[0]
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        v, dt = velocity(x, t), t_next - t
        drift = v + (t * v - x)  # (1 - t) score
        x += drift * dt + math.sqrt(2 * (1 - t) * dt) * NOISE[i + 1]
    return x


def score_sde_held_out(times: list[float], eta: float) -> float:
    x = score_sde(times, eta)
    return x + 0.04 * velocity(x, times[-1])


def flow_heun(times: list[float], eta: float) -> float:
    x = NOISE[0]
    for t, t_next in zip(times, times[1:]):
        v, dt = velocity(x, t), t_next - t
        x += dt * (v if t_next == 1 else (v + velocity(x + dt * v, t_next)) / 2)
    return x


def flow_multistep(times: list[float], eta: float) -> float:
    x, v_before, dt_before = NOISE[0], 0.0, 0.0
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        v, dt = velocity(x, t), t_next - t
        x += dt * (v if i == 0 else v + (v - v_before) / dt_before * dt / 2)
        v_before, dt_before = v, dt
    return x


FORMULAS = {
    "score-sde-1.0": score_sde_held_out,
    "score-sde-1.1": score_sde,
    "flow-ode": flow_ode,
    "flow-cps": flow_cps,
    "flow-sde": flow_sde,
    "flow-heun": flow_heun,
    "flow-multistep": flow_multistep,
}


@pytest.mark.parametrize("eta", [ETA, 0.5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_by_hand(name: str, eta: float) -> None:
    times = SAMPLERS[name].grid(4, SHIFT)
    assert run(name, times, eta) == pytest.approx(FORMULAS[name](times, eta))


def test_flow_sde_without_noise_is_the_flow(times: list[float]) -> None:
    assert run("flow-sde", times, 0.0) == pytest.approx(run("flow-ode", times))


def test_guidance_is_computed_in_float32() -> None:
    """In bfloat16 the difference of two large, close velocities would round away."""
    cond, uncond = torch.tensor([[257.0]]), torch.tensor([[256.0]])
    for branches in ([cond], [cond, uncond], [cond, cond, uncond]):
        velocities = torch.cat(branches).bfloat16()
        out = guide(velocities, len(branches), 1.5, 1.25)
        assert out.dtype == torch.float32
        assert torch.equal(out, guide(velocities.float(), len(branches), 1.5, 1.25))


def test_the_noise_stream_by_hand() -> None:
    """One generator: the posterior first, then every token's draws; captions share, pictures of a caption do not."""
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    stream = NoiseStream(7, captions=2, images_per_caption=3, token_dim=4)
    assert torch.equal(stream.for_posterior(0, 16, 2, 3), draw(1, 16, 2, 3))
    first = [draw(3, 4), draw(3, 4)]
    assert torch.equal(stream.for_token(2), torch.stack([torch.cat([d, d]) for d in first]))
    part = stream.part(range(1, 5))
    second = draw(3, 4)
    wanted = torch.cat([second, second])
    assert torch.equal(part.for_token(1)[0], wanted[1:5])
    assert torch.equal(stream.for_token(1)[0], wanted), "its part has not moved it"
