"""Fewer flow steps for later tokens: how many, at which of the times, and with which noise."""

from __future__ import annotations

import pytest
import torch

from nextstep_core.sampling.falling import LEVELS, STEPS_SCHEDULES, merging, part_of, step_counts
from nextstep_core.sampling.solvers import SAMPLERS


def test_steps_fall_as_their_schedule_says() -> None:
    assert step_counts("constant", 28, 1, 5) == [28] * 5
    assert step_counts("linear", 20, 1, 8) == [20, 18, 17, 15, 13, 11, 10, 8]
    assert step_counts("square", 20, 1, 8) == [20, 17, 14, 12, 10, 9, 8, 8]
    assert step_counts("linear", 4, 3, 8)[-1] == 3, "no fewer than the sampler can take"


@pytest.mark.parametrize("schedule", STEPS_SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 7, 16, 1024])
def test_they_only_fall_and_are_few(schedule: str, total: int) -> None:
    counts = step_counts(schedule, 50, 2, total)
    assert len(counts) == total and counts[0] == 50 and counts[-1] >= 2
    assert counts == sorted(counts, reverse=True) and len(set(counts)) <= LEVELS


def test_fewer_times_are_of_all_times() -> None:
    assert part_of(29, 29) == list(range(29))
    assert part_of(9, 5) == [0, 2, 4, 6, 8] and part_of(8, 2) == [0, 7] and part_of(5, 1) == [0]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("shift", [0.3, 1.0, 3.2])
def test_a_longer_step_takes_the_noise_of_those_that_it_stands_for(name: str, shift: float) -> None:
    """Standard normal and independent, as a solver wants them, and the sum of what the short steps would add."""
    sampler = SAMPLERS[name]
    times, count = sampler.grid(20, shift), sampler.noise_count(20)
    for steps in range(sampler.min_steps, 21):
        part = part_of(len(times), len(sampler.grid(steps, shift)))
        weights = merging(times, part, count)
        assert len(weights) == sampler.noise_count(steps)
        torch.testing.assert_close(weights @ weights.T, torch.eye(len(weights)))
        lengths = torch.tensor([times[stop] - times[start] for start, stop in zip(part, part[1:])])
        short = torch.tensor(times).diff().sqrt()
        if count > 1:
            walked = weights[1:, 1:] * lengths.sqrt()[:, None]  # by how much of each noise a longer step moves
            torch.testing.assert_close(walked.sum(dim=0)[: len(short)], short)


def test_all_steps_change_nothing() -> None:
    sampler = SAMPLERS["score-sde-1.0"]
    times = sampler.grid(12, 1.0)
    assert torch.equal(merging(times, part_of(len(times), len(times)), 12), torch.eye(12))
