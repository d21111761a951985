"""The named samplers: each integrates dx/dt = v from noise (t = 0) to data (t = 1) on its time grid.

A velocity function takes (x, i) and returns the guided velocity at times[i]; evaluating only at grid times lets the
head prepare all of them at once. `noise` holds the initial state and then one per stochastic step. From a
velocity at time t follow the noise estimate x - t v and the data estimate x + (1 - t) v.

Sources: the score SDE with a held-out last step and the flow ODE, CPS and SDE steps are those of the public NextStep-1
inference code of August 2025 ("1.0") and February 2026 ("1.1").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Velocity: TypeAlias = Callable[[Tensor, int], Tensor]

LAST_STEP = 0.04  # a plain step: near t = 1 the score, which divides by 1 - t, would magnify the network's error
ETA = 0.8  # how much of flow-cps and flow-sde is random; 0 would make them deterministic


def shift_times(times: list[float], shift: float) -> list[float]:
    """Bend a grid towards noise (shift > 1) or data (shift < 1): t / (shift - (shift - 1) t)."""
    return [t / (shift - (shift - 1) * t) for t in times]


def unit_grid(steps: int, shift: float) -> list[float]:
    """steps + 1 times from 0 to 1."""
    return [*shift_times([i / steps for i in range(steps)], shift), 1.0]


def held_out_grid(steps: int, shift: float) -> list[float]:
    """`steps` times from 0 to (shifted) 1 - LAST_STEP; the last one starts a plain step of LAST_STEP."""
    return shift_times([(1 - LAST_STEP) * i / (steps - 1) for i in range(steps)], shift)


def score_step(x: Tensor, v: Tensor, t: float, t_next: float, noise: Tensor) -> Tensor:
    """One Euler-Maruyama step of the reverse SDE whose drift is v + (1 - t) score."""
    dt = t_next - t
    score = (t * v - x) / (1 - t)
    return x + (v + (1 - t) * score) * dt + math.sqrt(2 * (1 - t) * dt) * noise


def score_sde_held_out(velocity: Velocity, times: list[float], noise: Tensor, eta: float) -> Tensor:
    """score-sde-1.0: stochastic steps along the grid, then one deterministic step of LAST_STEP."""
    x = noise[0]
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        x = score_step(x, velocity(x, i), t, t_next, noise[i + 1])
    return x + LAST_STEP * velocity(x, len(times) - 1)


def score_sde(velocity: Velocity, times: list[float], noise: Tensor, eta: float) -> Tensor:
    """score-sde-1.1: stochastic steps all the way to t = 1."""
    x = noise[0]
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        x = score_step(x, velocity(x, i), t, t_next, noise[i + 1])
    return x


def flow_ode(velocity: Velocity, times: list[float], noise: Tensor, eta: float) -> Tensor:
    """flow-ode: Euler steps, deterministic after the initial noise."""
    x = noise[0]
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        x = x + (t_next - t) * velocity(x, i)
    return x


def flow_cps(velocity: Velocity, times: list[float], noise: Tensor, eta: float) -> Tensor:
    """flow-cps: coefficient-preserving sampling; part of the noise estimate is replaced by fresh noise."""
    x = noise[0]
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        v = velocity(x, i)
        x0, x1 = x - t * v, x + (1 - t) * v
        fresh = (1 - t_next) * math.sin(eta * math.pi / 2)
        x = math.sqrt((1 - t_next) ** 2 - fresh**2) * x0 + t_next * x1 + fresh * noise[i + 1]
    return x


def flow_sde(velocity: Velocity, times: list[float], noise: Tensor, eta: float) -> Tensor:
    """flow-sde: Euler steps with noise of scale eta * sqrt(sigma / (1 - sigma)) and its drift correction."""
    x = noise[0]
    # At sigma = 1 the scale diverges; the 1.1 code puts the second-last grid time there, and so do we.
    sigma_max = times[-2]
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        v, sigma, dt = velocity(x, i), 1 - t, t_next - t
        x0, x1 = x - t * v, x + (1 - t) * v
        scale = eta * math.sqrt(sigma / (1 - (sigma_max if sigma == 1 else sigma)))
        mean = (1 - t_next) * x0 + t_next * x1 - scale**2 * dt / (2 * sigma) * x0
        x = mean + scale * math.sqrt(dt) * noise[i + 1]
    return x


def flow_heun(velocity: Velocity, times: list[float], noise: Tensor, eta: float) -> Tensor:
    """flow-heun: each step averages the velocities at both of its ends, second order, two network calls (Karras et
    al. 2022, on the flow ODE). The last step is Euler's: at t = 1 there is nothing left to evaluate."""
    x = noise[0]
    last = len(times) - 2
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        v, dt = velocity(x, i), t_next - t
        x = x + dt * v if i == last else x + dt * (v + velocity(x + dt * v, i + 1)) / 2
    return x


def flow_multistep(velocity: Velocity, times: list[float], noise: Tensor, eta: float) -> Tensor:
    """flow-multistep: Adams-Bashforth on the flow ODE, second order from the velocity before, one network call."""
    x = noise[0]
    v_before, dt_before = None, 0.0
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        v, dt = velocity(x, i), t_next - t
        slope = v if v_before is None else v + dt / (2 * dt_before) * (v - v_before)
        x, v_before, dt_before = x + dt * slope, v, dt
    return x


@dataclass(frozen=True)
class Sampler:
    """A named solver with its grid, its noise tensors and network calls per token, and the fewest steps it can take.

    `about` is what a user reads where it is chosen, in a few words.
    """

    about: str
    integrate: Callable[[Velocity, list[float], Tensor, float], Tensor]
    grid: Callable[[int, float], list[float]]
    noise_count: Callable[[int], int]
    min_steps: int = 1
    calls: Callable[[int], int] = lambda steps: steps


SAMPLERS: dict[str, Sampler] = {
    "score-sde-1.0": Sampler(
        "published for NextStep-1, random at every step",
        score_sde_held_out,
        held_out_grid,
        lambda steps: steps,
        min_steps=2,
    ),
    "score-sde-1.1": Sampler(
        "published for NextStep-1.1, random at every step", score_sde, unit_grid, lambda steps: steps + 1
    ),
    "flow-ode": Sampler("only the first noise is random, good with few steps", flow_ode, unit_grid, lambda steps: 1),
    "flow-cps": Sampler(
        "a little noise at every step, good with few steps", flow_cps, unit_grid, lambda steps: steps + 1
    ),
    "flow-sde": Sampler("noise at every step", flow_sde, unit_grid, lambda steps: steps + 1),
    "flow-heun": Sampler(
        "like flow-ode but more accurate, with two network calls per step",
        flow_heun,
        unit_grid,
        lambda steps: 1,
        calls=lambda steps: 2 * steps - 1,
    ),
    "flow-multistep": Sampler(
        "like flow-ode but more accurate, from about 6 steps", flow_multistep, unit_grid, lambda steps: 1
    ),
}


def normalize_token(token: Tensor) -> Tensor:
    """Layer norm of tokens (M, D) over their D numbers, without weights (the `use_norm` option)."""
    return torch.nn.functional.layer_norm(token, token.shape[-1:], eps=1e-6)
