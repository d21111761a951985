"""Which family a checkpoint is of, and the settings that its authors publish for it; decided once, while loading."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import NextStepError
from ..model.config import NextStepConfig
from ..sampling.settings import NUMBERS, GenerationSettings
from ..sentences import Sentence, Words
from .documents import GENERATION_CONFIG, Documents

log = logging.getLogger(__name__)

# The published settings, by family; the names are those of the released checkpoints.
TEXT_TO_IMAGE_1_0 = GenerationSettings()
TEXT_TO_IMAGE_PRETRAIN = GenerationSettings(steps=28, use_norm=False)
TEXT_TO_IMAGE_1_1 = GenerationSettings(steps=28, use_norm=False, sampler="score-sde-1.1")
EDIT_1_0 = GenerationSettings(cfg_img=2.0, shift=3.2)

# How generation_config.json spells the settings.
FILE_KEYS = {"steps": "num_sampling_steps", "shift": "timesteps_shift"}


@dataclass(frozen=True)
class Published:
    """What the authors of a checkpoint say of it: whether it is of the 1.1 family, and its settings for making and for
    editing an image."""

    is_1_1: bool
    text_to_image: GenerationSettings
    editing: GenerationSettings


def published(documents: Documents, config: NextStepConfig) -> Published:
    """What a checkpoint's documents say and, where they are silent, the name it was published under.

    What hangs on a name alone is said in the log: a renamed folder is another checkpoint then. NextStepError when
    `generation_config.json` holds a wrong value.
    """
    stated = documents.read(GENERATION_CONFIG) if documents.has(GENERATION_CONFIG) else {}
    where, name = documents.where(GENERATION_CONFIG), documents.name
    newer = config.base_image_grid_size is not None
    if not newer:
        newer = "nextstep-1.1" in name.lower()
        if newer or "sampler" not in stated:
            log.info(
                "%s: its config does not tell the model family; by its name it is taken for NextStep-%s",
                name,
                "1.1" if newer else "1.0",
            )
    making, editing = (_with_stated(published_settings(newer, name, kind), stated, where) for kind in (False, True))
    return Published(newer, text_to_image=making, editing=editing)


def purpose_of(name: str) -> str | None:
    """ "editing" or "text to image" by the name that a checkpoint was published under; None for other names."""
    if not name.lower().startswith("nextstep-1"):
        return None
    return "editing" if name.lower().endswith("edit") else "text to image"


def published_settings(is_1_1: bool, name: str, editing: bool) -> GenerationSettings:
    """The published settings for a checkpoint called `name` (folder or hub id), to make or to edit an image."""
    if editing or name.lower().endswith("edit"):
        return replace(EDIT_1_0, sampler="score-sde-1.1" if is_1_1 else "score-sde-1.0")
    if is_1_1:
        return TEXT_TO_IMAGE_1_1
    return TEXT_TO_IMAGE_PRETRAIN if name.lower().endswith("pretrain") else TEXT_TO_IMAGE_1_0


def _with_stated(settings: GenerationSettings, stated: dict[str, Any], where: Words) -> GenerationSettings:
    """What `generation_config.json` states, over the published settings."""
    keys = {f.name: FILE_KEYS.get(f.name, f.name) for f in fields(GenerationSettings)}
    for name, number in NUMBERS.items():
        if stated.get(keys[name]) is not None:
            replace(number, name=Sentence("{where}: `{key}`", where=where, key=keys[name])).check(stated[keys[name]])
    try:
        return settings.override(**{name: stated.get(key) for name, key in keys.items()})
    except NextStepError as error:
        raise NextStepError("{where}: {reason}", where=where, reason=error) from None
