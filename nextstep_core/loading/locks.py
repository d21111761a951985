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
from ..sentences import Sentence

POLL_SECONDS = 0.2


@contextmanager
def held(path: Path, taken: Sentence | Check) -> Iterator[None]:
    """Hold the lock that lies at `path`, whose folder must exist.

    While another holds it, `taken` is called a few times a second and may raise to stop; where it is a sentence,
    NextStepError with that.
    """
    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=0 if isinstance(taken, Sentence) else POLL_SECONDS)
        except Timeout:
            if isinstance(taken, Sentence):
                raise NextStepError.of(taken) from None
            taken()
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
