"""The one exception type that leaves the engine, and telling what a device's own errors mean. Imports no torch.

Every message is a sentence for the person at the screen.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable
from math import log10
from pathlib import Path
from typing import TypeVar

from .sentences import Sentence, Words, named

Error = TypeVar("Error", bound="NextStepError")


class NextStepError(ValueError):
    """Something about a checkpoint, a prompt or a setting is wrong; the message says what and what to do.

    Its text is English; `sentence` is the same for those who say it in another language.
    """

    def __init__(self, template: str, /, **values: object) -> None:
        self.sentence = Sentence.of(template, values)
        super().__init__(str(self.sentence))

    @classmethod
    def of(cls: type[Error], sentence: Sentence) -> Error:
        """The error with a sentence that is there already."""
        return cls(sentence.template, **sentence.values)


class OutOfMemory(NextStepError):
    """Even the smallest piece of the work does not fit into memory."""


REASON = 300  # characters of what a library says is wrong


def damaged(path: Path, reason: object) -> NextStepError:
    """The error for a file that cannot be read as what it should be; the reason stays in the words of who found it."""
    said = (str(reason).splitlines() or [type(reason).__name__])[0]
    said = said if len(said) <= REASON else f"{said[:REASON]}..."  # a library's may repeat what the file says
    return NextStepError(
        "{path} is damaged or incomplete ({said}). Delete it and download it again.", path=path, said=said
    )


def not_finite(what: Sentence) -> NextStepError:
    """The error for a stage of drawing whose result is not a number; no picture can come of it."""
    return NextStepError(
        "{what} holds NaN or infinite values, so there is no picture. Choose another dtype (bf16 or "
        "fp32); if that changes nothing, the weights are damaged: download them again.",
        what=what,
    )


NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def not_written(path: Path, error: OSError, size: int | None = None) -> NextStepError:
    """The error for a file or folder that cannot be written; `size` is how many bytes it was to have, where known."""
    if error.errno in NO_ROOM:
        free = shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free
        if size is None:
            return NextStepError(
                "There is no room for {path} on its disk, {free:.2f} GB free. Make room, or choose another disk.",
                path=path,
                free=free / 1e9,
            )
        return NextStepError(
            "There is no room for {path} on its disk: {needed:.2f} GB are needed, {free:.2f} GB free. Make room, or "
            "choose another disk.",
            path=path,
            needed=size / 1e9,
            free=free / 1e9,
        )
    if error.errno in NOT_ALLOWED:
        return NextStepError(
            "{path} cannot be written ({reason}). Choose a folder that you can write to.",
            path=path,
            reason=error.strerror,
        )
    return NextStepError(
        "{path} could not be written ({reason}). Check the disk and the name.",
        path=path,
        reason=error.strerror or error,
    )


SHOWN = 80  # characters of a text, digits of a number


def plainly(name: str) -> Words:
    """A name that may be anything, as a message shows it: as it is, where that is short and can be printed."""
    return name if name.isprintable() and len(name) <= SHOWN else shown(name)


def shown(value: object) -> Words:
    """A value as a message shows it: short, whatever it is."""
    if isinstance(value, str):
        if len(value) <= SHOWN:
            return repr(value)
        return Sentence("{text!r}... ({count:,} characters)", text=value[:SHOWN], count=len(value))
    if isinstance(value, int) and abs(value) >= 10**SHOWN:  # Python itself refuses to print some of these
        return Sentence("a number of {count:,} digits", count=int(value.bit_length() * log10(2)) + 1)
    if value is None or isinstance(value, (bool, int)):
        return str(value)
    if isinstance(value, float):
        return float.__repr__(value).removesuffix(".0")
    kind = type(value).__name__
    return Sentence("an {kind}", kind=kind) if kind[0] in "aeiou" else Sentence("a {kind}", kind=kind)


def check_choice(name: Words, value: object, choices: Iterable[object]) -> None:
    """NextStepError, naming the choices, when `value` is none of them."""
    choices = list(choices)
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise NextStepError(
            "{name} is {value}; choose one of {choices}.",
            name=named(name),
            value=shown(value),
            choices=", ".join(map(str, choices)),
        )


def check_text(name: Words, value: object) -> str:
    """The value; NextStepError when it is not text, or text that no file could hold."""
    if not isinstance(value, str):
        raise NextStepError("{name} is {value}; it must be text.", name=named(name), value=shown(value))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise NextStepError(
            "{name} holds half of a character ({half!r} at position {position:,}). Type it again.",
            name=named(name),
            half=value[error.start],
            position=error.start + 1,
        ) from None
    return value


OUT_OF_MEMORY_SIGNS = (
    "out of memory",  # CUDA, ROCm, XPU, MPS
    "invalid buffer size",  # MPS, for a single tensor that is larger than the device can hold
    "status_alloc_failed",  # cuBLAS and cuDNN
    "can't allocate memory",  # the host's allocator
    "cannot allocate memory",  # the host's system, for files that are mapped
    "not enough memory",  # the same on Windows
    "could not create a primitive",  # oneDNN, for whatever it has no memory for
    "could not create a memory object",
)


CUDA_OUT_OF_MEMORY = 2  # in a newer torch's error of any call to CUDA, whose text is the driver's


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at once would have gone through, whatever the device calls it."""
    import torch

    if isinstance(error, (NextStepError, MemoryError)):
        return isinstance(error, MemoryError)
    of_cuda = isinstance(error, getattr(torch, "AcceleratorError", ()))
    return (
        isinstance(error, torch.OutOfMemoryError)
        or (of_cuda and getattr(error, "error_code", None) == CUDA_OUT_OF_MEMORY)
        or any(sign in str(error).lower() for sign in OUT_OF_MEMORY_SIGNS)
    )
