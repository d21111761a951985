"""Which settings make sense."""

from __future__ import annotations

import math

import pytest

from nextstep_core import GenerationSettings, NextStepError
from nextstep_core.sampling.solvers import SAMPLERS

PLAIN = GenerationSettings()


def test_none_keeps_a_setting_and_false_does_not() -> None:
    assert PLAIN.override(cfg=None, use_norm=None) == PLAIN
    changed = PLAIN.override(cfg=1, use_norm=False, steps=7, cfg_schedule="linear")
    assert (changed.cfg, changed.use_norm, changed.steps, changed.cfg_schedule) == (1, False, 7, "linear")


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n in ("cfg", "cfg_img") for v in (0.99, -2, math.inf, math.nan)]
    + [("shift", v) for v in (0, -1, math.inf, math.nan)]
    + [("steps", 1), ("sampler", "euler"), ("cfg_schedule", "cosine")],
)
def test_what_makes_no_sense_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(NextStepError, match=f"^{name} is "):
        PLAIN.override(**{name: value})


def test_the_least_is_enough() -> None:
    PLAIN.override(cfg=1.0, cfg_img=1.0, shift=0.01, steps=2)
    for name in set(SAMPLERS) - {"score-sde-1.0"}:
        PLAIN.override(sampler=name, steps=1)
    with pytest.raises(NextStepError, match="score-sde-1.0 needs at least 2"):
        PLAIN.override(sampler="score-sde-1.0", steps=1)
