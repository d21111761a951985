"""One at a time on one file or folder, between processes and threads.

The operating system lets go of a lock when its process ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import NextStepError
from ..runtime.interrupt import Check

POLL_SECONDS = 0.2


@contextmanager
def held(path: Path, refusal: str, waiting: Check | None = None) -> Iterator[None]:
    """Hold the lock that lies at `path`, whose folder must exist.

    While another holds it, `waiting` is called a few times a second and may raise to stop; without one, NextStepError
    with the sentence `refusal`.
    """
    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=0 if waiting is None else POLL_SECONDS)
        except Timeout:
            if waiting is None:
                raise NextStepError(refusal) from None
            waiting()
            continue
        if path.exists():
            break
        lock.release()  # the one who held it has removed the file, so another may lock a new one
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            path.unlink()
        lock.release()
