"""Sampling settings: what a user may set, and which values make sense."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..errors import NextStepError, check_choice
from .guidance import SCHEDULES
from .solvers import SAMPLERS


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

    def override(self, **values: Any) -> GenerationSettings:
        """These settings with every value that is not None replaced; NextStepError when the result makes no sense."""
        settings = replace(self, **{name: value for name, value in values.items() if value is not None})
        settings.check()
        return settings

    def check(self) -> None:
        """NextStepError, in one sentence, for the first value that cannot work."""
        for name in ("cfg", "cfg_img"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 1):
                raise NextStepError(f"{name} is {value:g}; use 1.0 to turn this guidance off or a larger value.")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise NextStepError(f"shift is {self.shift:g}; it must be above 0 (1.0 leaves the time grid as it is).")
        check_choice("cfg_schedule", self.cfg_schedule, SCHEDULES)
        check_choice("sampler", self.sampler, SAMPLERS)
        least = SAMPLERS[self.sampler].min_steps
        if self.steps < least:
            raise NextStepError(f"steps is {self.steps}; {self.sampler} needs at least {least}.")
