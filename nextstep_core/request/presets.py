"""Presets: size, settings and negative prompt under one name, built in or from a file of the user's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import NextStepError, check_choice, check_text, shown
from ..images.latents import HEIGHT, PUBLISHED_LATENTS, WIDTH
from ..loading.documents import SMALL_DOCUMENT, parse_object
from ..loading.files import can_be_shown, read_all
from ..sampling.settings import NUMBERS, GenerationSettings
from ..sentences import Sentence

log = logging.getLogger(__name__)

MOST_PRESETS, LONGEST_NAME = 100, 60
SIDES = {str(side.name): side for side in (WIDTH, HEIGHT)}
TEXTS = ("negative_prompt", "note")


@dataclass(frozen=True)
class Preset:
    """Width and height in pixels, settings, and a negative prompt. None is what the checkpoint was published with, to
    edit where `editing`. `note` is told to whoever chooses it."""

    width: int = 512
    height: int = 512
    steps: int | None = None
    cfg: float | None = None
    cfg_img: float | None = None
    shift: float | None = None
    negative_prompt: str = ""
    note: str = ""
    editing: bool = False

    def over(self, published: GenerationSettings) -> GenerationSettings:
        """The preset's settings over those that a checkpoint was published with."""
        return published.override(steps=self.steps, cfg=self.cfg, cfg_img=self.cfg_img, shift=self.shift)


BUILT_IN: dict[str, Preset] = {
    "draft": Preset(steps=20, cfg=6.0),
    "standard": Preset(768, 768, 28, 7.5, note="768x768 is larger than the authors recommend"),
    "premium": Preset(1024, 1024, 40, 8.5, note="1024x1024 was not part of the training"),
    "published": Preset(),
    "edit": Preset(negative_prompt="Copy original image.", editing=True),
}


def find_preset(name: str, file: Path) -> Preset:
    """A preset by its name; NextStepError when there is none of it, or when the user's file is wrong."""
    presets = all_presets(file)
    check_choice("preset", name, presets)
    return presets[name]


def preset_names(file: Path) -> list[str]:
    """The names to choose from. A file that is wrong is told in the log, and when one of its presets is used."""
    try:
        return list(all_presets(file))
    except NextStepError as error:
        log.warning("%s", error)
        return list(BUILT_IN)


def all_presets(file: Path) -> dict[str, Preset]:
    """The built-in presets, and over them those of a JSON file, if it is there: {"name": {"width": 640, ...}, ...}.

    A preset with a built-in's name changes what it states. NextStepError for the first thing that is wrong in the file.
    """
    try:
        text = read_all(file, SMALL_DOCUMENT).decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return BUILT_IN
    except (OSError, UnicodeDecodeError) as error:
        raise NextStepError(
            "{file} is not readable ({reason}). Mend it, or remove it.", file=file, reason=error
        ) from None
    stated = parse_object(text, str(file), Sentence("Mend it, or remove it."))
    if len(stated) > MOST_PRESETS:
        raise NextStepError(
            "{file} holds {count:,} presets; at most {most} are allowed.",
            file=file,
            count=len(stated),
            most=MOST_PRESETS,
        )
    return BUILT_IN | {name: _checked(name, values, str(file)) for name, values in stated.items()}


def _checked(name: str, values: object, file: str) -> Preset:
    if not 0 < len(name) <= LONGEST_NAME or not can_be_shown(name) or name != name.strip():
        raise NextStepError(
            "{where}: {name} cannot be the name of a preset. Use 1 to {most} letters, with none of them a "
            "space at an end.",
            where=file,
            name=shown(name),
            most=LONGEST_NAME,
        )
    where = Sentence("{file}: {name}", file=file, name=shown(name))
    if not isinstance(values, Mapping):
        raise NextStepError(
            '{where} is {what}; write an object, such as {{"width": 640}}.', where=where, what=shown(values)
        )
    known = [field.name for field in fields(Preset)]
    for key in values:
        check_choice(Sentence("{where}: a key", where=where), key, known)
    return replace(BUILT_IN.get(name, Preset()), **{key: _value(key, value, where) for key, value in values.items()})


def _value(key: str, value: Any, preset: Sentence) -> Any:
    where = Sentence("{preset}: {key}", preset=preset, key=key)
    if key in SIDES:
        return PUBLISHED_LATENTS.check_side(replace(SIDES[key], name=where), value)
    if key in TEXTS:
        return check_text(where, value)
    if key in NUMBERS:
        return None if value is None else replace(NUMBERS[key], name=where).check(value)
    if not isinstance(value, bool):
        raise NextStepError("{where} is {value}; write true or false.", where=where, value=shown(value))
    return value
