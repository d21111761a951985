"""Sampling settings: what a user may set, and which values make sense."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import NextStepError, check_choice, shown
from ..ranges import Range
from ..sentences import Sentence
from .falling import CONSTANT, STEPS_SCHEDULES, step_counts
from .guidance import SCHEDULES
from .solvers import SAMPLERS

STEPS = Range("steps", 1, 1000)
CFG = Range("cfg", 1.0, 100.0, Sentence("where 1 turns this guidance off"))
CFG_IMG = Range("cfg_img", 1.0, 100.0, CFG.note)
SHIFT = Range("shift", 0.01, 100.0)
SEED = Range("seed", 0, 2**64 - 1)
OFF = "off"
LOOKAHEAD = (OFF, "exact", "fast")  # how many tokens are drawn per read of the weights, and how exactly
NUMBERS: dict[str, Range[Any]] = {str(number.name): number for number in (STEPS, CFG, CFG_IMG, SHIFT)}


@dataclass(frozen=True)
class GenerationSettings:
    """Everything that shapes how tokens are drawn. cfg and cfg_img of 1.0 are off."""

    cfg: float = 7.5
    cfg_img: float = 1.0
    cfg_schedule: str = "constant"
    steps: int = 50
    shift: float = 1.0
    sampler: str = "score-sde-1.0"
    use_norm: bool = True
    lookahead: str = OFF
    steps_schedule: str = CONSTANT

    def override(self, **values: Any) -> GenerationSettings:
        """These settings with every value that is not None replaced; NextStepError when the result makes no sense."""
        stated = {name: value for name, value in values.items() if value is not None}
        stated |= {name: NUMBERS[name].check(stated[name]) for name in stated.keys() & NUMBERS}
        settings = replace(self, **stated)
        settings.check()
        return settings

    def check(self) -> None:
        """NextStepError, in one sentence, for the first value that cannot work."""
        for name, number in NUMBERS.items():
            number.check(getattr(self, name))
        check_choice("cfg_schedule", self.cfg_schedule, SCHEDULES)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("lookahead", self.lookahead, LOOKAHEAD)
        check_choice("steps_schedule", self.steps_schedule, STEPS_SCHEDULES)
        if not isinstance(self.use_norm, bool):
            raise NextStepError("use_norm is {value}; use True or False.", value=shown(self.use_norm))
        least = SAMPLERS[self.sampler].min_steps
        if self.steps < least:
            raise NextStepError(
                "steps is {steps}; {sampler} needs at least {least}.",
                steps=self.steps,
                sampler=self.sampler,
                least=least,
            )

    def step_counts(self, total: int) -> list[int]:
        """The flow steps of each of `total` tokens."""
        return step_counts(self.steps_schedule, self.steps, SAMPLERS[self.sampler].min_steps, total)

    def calls(self, total: int) -> int:
        """Network calls of the head for one of `total` tokens, as their rounded mean: at most so many where they are
        checked."""
        calls = SAMPLERS[self.sampler].calls
        return round(sum(map(calls, self.step_counts(total))) / total)
