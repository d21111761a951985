"""Rate, share done and time left, by hand."""

from __future__ import annotations

import pytest
import torch

from nextstep_core import Progress
from nextstep_core.decoding.progress import TokenStep

# 10 places, 6 done of which 4 were sampled in 8 seconds; 3 are still to be.
STEP = TokenStep(done=6, total=10, sampled=4, left=3, seconds=8.0)


def test_a_step_by_hand() -> None:
    assert STEP.tokens_per_second == 0.5
    assert STEP.seconds_left == 6.0


def test_nothing_is_known_before_the_first_token() -> None:
    assert TokenStep(1, 10, 0, 9, 2.0).seconds_left == 0
    assert TokenStep(1, 10, 1, 9, 0.0).tokens_per_second == 0


@pytest.mark.parametrize(
    ("start", "stop", "done", "left"),
    [
        (0, 4, 6, 6.0),  # all together
        (0, 1, 1, 6.0 + 3 * 14.0),  # three more, each of which takes 8 + 6 seconds
        (1, 2, 4, 6.0 + 2 * 14.0),  # (10 + 6) of 40 places are 4 of 10
        (2, 4, 8, 6.0),
        (0, 2, 3, 6.0 + 14.0),
    ],
)
def test_a_job_in_parts_by_hand(start: int, stop: int, done: int, left: float) -> None:
    progress = Progress(STEP, start, stop, torch.zeros(4, 10, 2))
    assert (progress.done, progress.total, progress.seconds_left) == (done, 10, left)
    assert progress.tokens_per_second == 0.5


def test_a_finished_job_is_whole() -> None:
    last = Progress(TokenStep(10, 10, 7, 0, 8.0), 2, 4, torch.zeros(4, 10, 2))
    assert (last.done, last.seconds_left) == (10, 0)
