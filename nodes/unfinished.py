"""What an interrupted run has kept, found again when the same is asked for once more."""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .types import HostModel, PromptValue

MOST = 4  # kept at once; each is a few megabytes at most


@dataclass(frozen=True, eq=False)
class Kept:
    """An interrupted run: what it was asked, and the LATENT that it came to."""

    widgets: dict[str, Any]
    model: weakref.ref[HostModel]
    sockets: tuple[PromptValue | None, ...]
    canvas: Tensor
    latent: dict[str, Any]


_kept: deque[Kept] = deque(maxlen=MOST)
_asked: deque[dict[str, Any]] = deque(maxlen=64)  # the widgets of all interrupted runs, finished since or not


def keep(
    latent: dict[str, Any],
    model: HostModel,
    sockets: tuple[PromptValue | None, ...],
    canvas: dict[str, Any],
    widgets: dict[str, Any],
) -> None:
    """Remember what an interrupted run came to."""
    _asked.append(widgets)
    _kept.append(Kept(widgets, weakref.ref(model), sockets, canvas["samples"], latent))


def find(
    model: HostModel, sockets: tuple[PromptValue | None, ...], canvas: dict[str, Any], widgets: dict[str, Any]
) -> dict[str, Any] | None:
    """The LATENT that an interrupted run of just this came to; None where there was none.

    Sockets are compared as objects: the host hands out the ones that it keeps as long as nothing before them changed.
    """
    for kept in reversed(_kept):
        same = kept.model() is model and kept.canvas is canvas["samples"] and kept.widgets == widgets
        if same and all(ours is theirs for ours, theirs in zip(kept.sockets, sockets, strict=True)):
            return kept.latent
    return None


def forget(latent: dict[str, Any] | None) -> None:
    """A run went on from this, which `find` gave."""
    for kept in [kept for kept in _kept if kept.latent is latent]:
        _kept.remove(kept)


def times_interrupted(widgets: dict[str, Any]) -> int:
    """How many runs with these widgets were interrupted and kept; a linked widget, which is None, may be anything.

    It is part of what the host caches a node's output by, so that a part is never taken for the whole.
    """
    stated = {name: value for name, value in widgets.items() if value is not None}
    return sum(all(asked.get(name, value) == value for name, value in stated.items()) for asked in _asked)
