"""The one exception type that leaves the engine: every message is a sentence for the person at the screen."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class NextStepError(ValueError):
    """Something about a checkpoint, a prompt or a setting is wrong; the message says what and what to do."""


def damaged(path: Path, reason: object) -> NextStepError:
    """The error for a file that cannot be read as what it should be."""
    return NextStepError(f"{path} is damaged or incomplete ({reason}). Delete it and download it again.")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """NextStepError, naming the choices, when `value` is none of them."""
    choices = list(choices)
    if value not in choices:
        raise NextStepError(f"{name} is {value!r}; choose one of {', '.join(map(str, choices))}.")
