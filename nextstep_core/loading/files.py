"""Opening files that strangers made: only regular ones, wherever a link leads, and no more than is asked for.

A pipe would make us wait for ever, an endless device would fill the memory, and some devices act when they are opened.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from ..errors import NextStepError

NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and bytes that stand for none


def can_be_shown(name: str) -> bool:
    """Whether a file's name is a text that a list can show."""
    return NO_TEXT.search(name) is None


def is_file(path: Path) -> bool:
    """Whether there is a regular file, links followed; False for what cannot even be looked at."""
    return os.path.isfile(path)  # pathlib's raises where a folder may not be read


def is_folder(path: Path) -> bool:
    """Whether there is a folder, links followed; False for what cannot even be looked at."""
    return os.path.isdir(path)


def stat_of(file: Path) -> tuple[str, int, int] | None:
    """(name, size, when it was changed) of a regular file, None for anything else."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return (file.name, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def check_regular(path: Path) -> None:
    """NextStepError for what is there but no regular file. OSError where nothing is there."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise NextStepError(
            "{path} is not a regular file (but a pipe, a device or a folder). Replace it with one.", path=path
        )


def read_head(path: Path, count: int) -> bytes:
    """The first `count` bytes of a regular file, fewer where it is shorter; OSError and NextStepError as above."""
    check_regular(path)
    # Looked at once more when open, for the case that it was replaced in between; and not waited for, if so by a pipe.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NextStepError("{path} is not a regular file. Replace it with one.", path=path)
        return file.read(count) or b""  # None where a read would have waited


def read_all(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes; NextStepError for a larger one, before it is read."""
    check_regular(path)
    size = os.stat(path).st_size
    data = read_head(path, limit + 1) if size <= limit else b""
    if size > limit or len(data) > limit:  # some files tell no size, or not the true one
        raise NextStepError(
            "{path} holds {size:,} bytes; a file of this name has at most {limit:,}. Download the file again.",
            path=path,
            size=max(size, len(data)),
            limit=limit,
        )
    return data
