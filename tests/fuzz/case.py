"""What a kind makes: one attempt on hostile input, from a name that gives the same attempt again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from random import Random

from torch import Tensor

Attempt = Callable[[Path], "Tensor | None"]


@dataclass(frozen=True)
class Case:
    """`what` says what is hostile. `attempt` is given an empty folder and returns the pictures that came out, or None
    where there was nothing to draw; they must have the `shape` (B, H, W, 3) where one is stated."""

    what: str
    attempt: Attempt
    shape: tuple[int, ...] | None = None


def name_of(kind: str, seed: int, number: int) -> str:
    """The name that a case is repeated by."""
    return f"{kind}:{seed}:{number}"


def make(name: str) -> Case:
    """The case of a name; all that is random in it comes from the name."""
    case: Case = import_module(f"{__package__}.{name.partition(':')[0]}").case(Random(name))
    return case
