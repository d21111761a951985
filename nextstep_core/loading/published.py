"""Which family a checkpoint is of, and the settings that its authors publish for it."""

from __future__ import annotations

from dataclasses import fields, replace

from ..errors import NextStepError
from ..model.config import NextStepConfig
from ..sampling.settings import GenerationSettings
from .documents import GENERATION_CONFIG, Documents

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
