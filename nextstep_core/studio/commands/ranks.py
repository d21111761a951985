"""A command that several processes run as one: they work in step, and one of them speaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from ...errors import NextStepError
from ...runtime.parallel import Ranks
from .app import FAILED

TensorParallel = Annotated[
    bool,
    typer.Option("--tensor-parallel", help="One picture over several GPUs, by processes that torchrun starts."),
]


@contextmanager
def together(wanted: bool, device: str) -> Iterator[Ranks | None]:
    """Inside, this process is one of several, where that is `wanted`. When one fails, one of them says why, and all
    end."""
    if not wanted:
        yield None
        return
    ranks = Ranks.join(device)
    try:
        yield ranks
    except Exception as error:
        if not ranks.speaks():
            raise typer.Exit(FAILED) from None
        if isinstance(error, RuntimeError):  # of whatever carries the sums
            raise NextStepError(
                "Drawing with several processes failed in process {number} ({reason}).",
                number=ranks.share.rank + 1,
                reason=(str(error).splitlines() or [type(error).__name__])[0],
            ) from None
        raise
    ranks.leave()
