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


def go_on() -> None:
    """The check that stops nothing."""


def leaves(network: nn.Module) -> Iterator[nn.Module]:
    """The layers of a network that consist of no others."""
    return (module for module in network.modules() if next(module.children(), None) is None)


@contextmanager
def checked(layers: Iterable[nn.Module], check: Check) -> Iterator[None]:
    """Inside, each of `layers` calls `check` before it runs."""
    if check is go_on:
        yield
        return

    def before(*_: object) -> None:
        # What is raised while CUDA captures would be taken for a failure of the capture.
        if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
            check()

    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
