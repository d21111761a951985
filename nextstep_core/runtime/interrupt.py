"""Stopping long work from outside.

Whoever may want to stop hands in a check: a function that does nothing, or raises. Long work calls it wherever it can
be left, several times a second. Work that reports its progress may be stopped by its report in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import nn

Check: TypeAlias = Callable[[], None]
STOPS = "stops_long_work"  # an attribute of what a check raised


def go_on() -> None:
    """The check that stops nothing."""


def is_stop(error: BaseException) -> bool:
    """Whether a check raised this on the way through a network: no failure of the work, and nobody's to swallow."""
    return getattr(error, STOPS, False)


def leaves(network: nn.Module) -> Iterator[nn.Module]:
    """The layers of a network that consist of no others."""
    return (module for module in network.modules() if next(module.children(), None) is None)


class Hook:
    """Calls a check before a layer; `stopped` tells afterwards whether it raised."""

    def __init__(self, check: Check) -> None:
        self._check, self.stopped = check, False

    def __call__(self, *_: object) -> None:
        # What is raised while CUDA captures would be taken for a failure of the capture.
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return
        self.stopped = True
        try:
            self._check()
        except BaseException as error:
            setattr(error, STOPS, True)
            raise
        self.stopped = False


@contextmanager
def checked(layers: Iterable[nn.Module], check: Check) -> Iterator[Hook]:
    """Inside, each of `layers` calls `check` before it runs."""
    hook = Hook(check)
    handles = [] if check is go_on else [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield hook
    finally:
        for handle in handles:
            handle.remove()
