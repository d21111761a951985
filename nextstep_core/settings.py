"""Sampling settings: what a user may set, what a checkpoint recommends, and which values make sense."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from .config import NextStepConfig
from .errors import NextStepError, check_choice
from .loading.documents import GENERATION_CONFIG, Documents
from .sampling.guidance import SCHEDULES
from .sampling.solvers import SAMPLERS


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


# The published settings, by family; the names are those of the released checkpoints.
TEXT_TO_IMAGE_1_0 = GenerationSettings()
TEXT_TO_IMAGE_PRETRAIN = GenerationSettings(steps=28, use_norm=False)
TEXT_TO_IMAGE_1_1 = GenerationSettings(steps=28, use_norm=False, sampler="score-sde-1.1")
EDIT_1_0 = GenerationSettings(cfg_img=2.0, shift=3.2)

# How generation_config.json spells the settings.
FILE_KEYS = {"steps": "num_sampling_steps", "shift": "timesteps_shift"}


def is_1_1(config: NextStepConfig, name: str) -> bool:
    """Whether a checkpoint is of the 1.1 family: its config says so, or the name it was published under."""
    return config.base_image_grid_size is not None or "nextstep-1.1" in name.lower()


def published_settings(config: NextStepConfig, name: str, editing: bool) -> GenerationSettings:
    """The published settings for a checkpoint called `name` (folder or hub id), to make or to edit an image."""
    if editing or name.lower().endswith("edit"):
        sampler = "score-sde-1.1" if is_1_1(config, name) else "score-sde-1.0"
        return replace(EDIT_1_0, sampler=sampler)
    if is_1_1(config, name):
        return TEXT_TO_IMAGE_1_1
    return TEXT_TO_IMAGE_PRETRAIN if name.lower().endswith("pretrain") else TEXT_TO_IMAGE_1_0


def recommended_settings(documents: Documents, config: NextStepConfig, name: str, editing: bool) -> GenerationSettings:
    """What `generation_config.json` beside the config states, over the published settings of the family."""
    published = published_settings(config, name, editing)
    if not documents.has(GENERATION_CONFIG):
        return published
    stated = documents.read(GENERATION_CONFIG)
    keys = {f.name: FILE_KEYS.get(f.name, f.name) for f in fields(GenerationSettings)}
    for name, key in keys.items():
        value, default = stated.get(key), getattr(published, name)
        fits = isinstance(value, (int, float) if isinstance(default, float) else type(default))
        if value is not None and not fits:
            raise NextStepError(
                f"{documents.where(GENERATION_CONFIG)}: `{key}` is {value!r}, which is of a wrong type."
            )
    return published.override(**{name: stated.get(key) for name, key in keys.items()})
