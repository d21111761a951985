"""How a case ended."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

import torch

from nextstep_core.errors import NextStepError, is_out_of_memory

from .case import Case

OWN, PICTURE, FINE = "own error", "picture", "fine"
RAW, HANG, MEMORY, DEATH, BLACK = "raw", "hang", "memory", "death", "black"
GOOD, BAD = (OWN, PICTURE, FINE), (RAW, HANG, MEMORY, DEATH, BLACK)
LONGEST = 2000  # characters of an error that a person is to read


@dataclass(frozen=True)
class Outcome:
    """`detail` is the message of our own error, or what a finding is to be understood by."""

    name: str
    kind: str
    what: str = ""
    detail: str = ""
    seconds: float = 0.0
    grown: int = 0  # bytes that the process took at its peak, beyond what it had before


def of_pictures(case: Case, images: torch.Tensor | None) -> tuple[str, str]:
    """(outcome, detail) of a case that raised nothing."""
    if images is None:
        return FINE, ""
    if case.shape is not None and tuple(images.shape) != case.shape:
        return RAW, f"the pictures are {tuple(images.shape)}, {case.shape} was asked for"
    if not images.isfinite().all():
        return BLACK, "the pictures are not finite"
    if any(bool((image == image.flatten()[0]).all()) for image in images):
        return BLACK, "a picture has one color only"
    return PICTURE, ""


def of_error(error: BaseException) -> tuple[str, str]:
    """(outcome, detail) of a case that raised."""
    said = str(error)
    if isinstance(error, MemoryError) or is_out_of_memory(RuntimeError(said)):
        return MEMORY, "".join(traceback.format_exception(error))
    if not isinstance(error, NextStepError):
        return RAW, "".join(traceback.format_exception(error))
    if "\n" in said or len(said) > LONGEST:
        return RAW, f"our own error, but {len(said)} characters in {said.count(chr(10)) + 1} lines: {said[:LONGEST]}"
    return OWN, said
