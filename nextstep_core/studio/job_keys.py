"""What may stand in a job file: every key once, with its check, from which the published schema is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import NextStepError, check_choice, check_text, shown
from ..images.latents import HEIGHT, PUBLISHED_LATENTS, WIDTH
from ..images.saving import FORMATS, QUALITY
from ..ranges import Range
from ..request.sizes import RATIO_NAMES
from ..sampling.falling import STEPS_SCHEDULES
from ..sampling.guidance import SCHEDULES
from ..sampling.settings import CFG, CFG_IMG, LOOKAHEAD, SEED, SHIFT, STEPS
from ..sampling.solvers import SAMPLERS
from ..sentences import Words
from .lines import at
from .prompts import COMBINE

LONGEST_TITLE = 200  # letters


@dataclass(frozen=True)
class Key:
    """What may stand under a key: `check(where, value)` returns the value or raises; `schema` says the same in JSON
    schema."""

    check: Callable[[Words, Any], Any]
    schema: Mapping[str, Any]


def number_key(number: Range[Any], name: Words = "") -> Key:
    kind = "integer" if isinstance(number.minimum, int) else "number"
    ends = {"minimum": number.minimum, "maximum": number.maximum}
    return Key(
        lambda where, value: replace(number, name=at(where, name or number.name)).check(value),
        {"type": kind, **ends},
    )


def _side(side: Range[int]) -> Key:
    unit = PUBLISHED_LATENTS.unit
    return Key(
        lambda where, value: PUBLISHED_LATENTS.check_side(replace(side, name=at(where, side.name)), value),
        {"type": "integer", "minimum": side.minimum, "maximum": side.maximum, "multipleOf": unit},
    )


def _choice(name: str, choices: Sequence[str]) -> Key:
    def check(where: Words, value: Any) -> Any:
        check_choice(at(where, name), value, choices)
        return value

    return Key(check, {"enum": list(choices)})


def _text(name: str) -> Key:
    return Key(lambda where, value: check_text(at(where, name), value), {"type": "string"})


def title_key(name: str) -> Key:
    """A short text, which is shown in one line."""

    def check(where: Words, value: Any) -> str:
        text = check_text(at(where, name), value)
        if len(text) > LONGEST_TITLE:
            raise NextStepError(
                "{where}: {name} has {count:,} letters; use at most {most}.",
                where=where,
                name=name,
                count=len(text),
                most=LONGEST_TITLE,
            )
        return text

    return Key(check, {"type": "string", "maxLength": LONGEST_TITLE})


def _flag(name: str) -> Key:
    def check(where: Words, value: Any) -> bool:
        if not isinstance(value, bool):
            raise NextStepError(
                "{where}: {name} is {value}; write true or false.", where=where, name=name, value=shown(value)
            )
        return value

    return Key(check, {"type": "boolean"})


def size_of(where: Words, value: object) -> tuple[int, int] | str:
    """(width, height) as people state it: 512, "768x512" or [768, 512]; a ratio such as "16:9" comes out as it is."""
    if isinstance(value, str) and value in RATIO_NAMES:
        return value
    sides: Any = value
    if isinstance(value, str):
        sides = [int(part) if part.isdecimal() and len(part) < 9 else part for part in value.lower().split("x")]
        sides = sides * 2 if len(sides) == 1 else sides
    elif isinstance(value, int):
        sides = [value, value]
    if not isinstance(sides, list) or len(sides) != 2 or not all(type(side) is int for side in sides):
        raise NextStepError(
            '{where}: size is {value}; write 512, "768x512" or a ratio such as "16:9".', where=where, value=shown(value)
        )
    width, height = (_side(side).check(where, value) for side, value in zip((WIDTH, HEIGHT), sides))
    return width, height


SIZE_SCHEMA = {"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "array", "items": {"type": "integer"}}]}
SETTINGS: dict[str, Key] = {
    "label": title_key("label"),
    "preset": _text("preset"),
    "size": Key(size_of, SIZE_SCHEMA),
    "width": _side(WIDTH),
    "height": _side(HEIGHT),
    "steps": number_key(STEPS),
    "cfg": number_key(CFG),
    "guidance": number_key(CFG, "guidance"),
    "cfg_img": number_key(CFG_IMG),
    "cfg_schedule": _choice("cfg_schedule", list(SCHEDULES)),
    "shift": number_key(SHIFT),
    "sampler": _choice("sampler", list(SAMPLERS)),
    "use_norm": _flag("use_norm"),
    "lookahead": _choice("lookahead", list(LOOKAHEAD)),
    "steps_schedule": _choice("steps_schedule", list(STEPS_SCHEDULES)),
    "negative_prompt": _text("negative_prompt"),
    "quality": _text("quality"),
}
SEEDS_SCHEMA = {
    "anyOf": [
        {"type": "array", "items": number_key(SEED).schema, "minItems": 1},
        {
            "type": "object",
            "properties": {"first": number_key(SEED).schema, "count": {"type": "integer", "minimum": 1}},
            "required": ["first", "count"],
            "additionalProperties": False,
        },
    ]
}
TEXTS_SCHEMA = {"type": "array", "items": {"type": "string"}}
SETTINGS_SCHEMA = {
    "type": "object",
    "properties": {n: dict(k.schema) for n, k in SETTINGS.items()},
    "additionalProperties": False,
}
SEVERAL_SETTINGS = {
    "anyOf": [{"$ref": "#/$defs/settings"}, {"type": "array", "items": {"$ref": "#/$defs/settings"}, "minItems": 1}]
}
JOB_KEYS = {
    "prompt": {"type": "string"},
    "negative_prompt": {"type": "string"},
    "images": TEXTS_SCHEMA,
    "settings": SEVERAL_SETTINGS,
    "seeds": SEEDS_SCHEMA,
    "name": dict(title_key("name").schema),
}
FILE_KEYS = {
    "$schema": {"type": "string"},
    "title": dict(title_key("title").schema),
    "model": {"type": "string"},
    "settings": SEVERAL_SETTINGS,
    "seeds": SEEDS_SCHEMA,
    "lists": {"type": "object", "additionalProperties": TEXTS_SCHEMA},
    "combine": {"enum": list(COMBINE)},
    "prompts": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/prompt"}]}},
    "jobs": {"type": "array", "items": {"$ref": "#/$defs/job"}},
    "format": {"enum": list(FORMATS)},
    "quality": number_key(QUALITY).schema,
    "names": {"type": "string"},
}


def schema() -> dict[str, Any]:
    """The JSON schema of job files, from which editors complete."""

    def thing(keys: Mapping[str, Any], *required: str) -> dict[str, Any]:
        return {"type": "object", "properties": dict(keys), "required": list(required), "additionalProperties": False}

    prompt = {name: JOB_KEYS[name] for name in ("prompt", "negative_prompt", "name")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Pictures to draw with NextStep-1",
        **thing(FILE_KEYS),
        "anyOf": [{"required": ["jobs"]}, {"required": ["prompts"]}],
        "$defs": {
            "settings": SETTINGS_SCHEMA,
            "prompt": thing(prompt, "prompt"),
            "job": thing(JOB_KEYS, "prompt"),
        },
    }
