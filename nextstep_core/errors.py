"""The one exception type that leaves the engine: every message is a sentence for the person at the screen."""

from __future__ import annotations

from collections.abc import Iterable


class NextStepError(ValueError):
    """Something about a checkpoint, a prompt or a setting is wrong; the message says what and what to do."""


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """NextStepError, naming the choices, when `value` is none of them."""
    choices = list(choices)
    if value not in choices:
        raise NextStepError(f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}.")
