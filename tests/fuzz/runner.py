"""Cases to outcomes: a few long-lived children, each watched by a thread that kills it when a case takes too long."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from queue import Queue
from threading import Lock, Thread

from . import outcome as ends
from .case import name_of
from .child import serve
from .outcome import Outcome

START_SECONDS = 300  # for a child to import everything on a busy machine


@dataclass(frozen=True)
class Limits:
    """What a case may take: seconds, and bytes of memory beyond what its process had."""

    seconds: float = 20.0
    grown: int = 200 << 20


class Child:
    """One process for case after case; started anew after it was killed or died."""

    def __init__(self, kinds: tuple[str, ...], limits: Limits) -> None:
        self._arguments, self._limits = (kinds, limits.grown), limits
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()
        if not self._pipe.poll(START_SECONDS):
            raise TimeoutError("a child did not start")
        self._pipe.recv()

    def run(self, name: str) -> Outcome:
        """How the case of this name ended."""
        try:
            self._pipe.send(name)
            if self._pipe.poll(self._limits.seconds):
                ended: Outcome = self._pipe.recv()
                return ended
            ended = Outcome(name, ends.HANG, detail=f"not done after {self._limits.seconds:g} s")
        except (EOFError, ConnectionError):
            self._process.join()
            ended = Outcome(name, ends.DEATH, detail=f"the process ended with {self._process.exitcode}")
        self.stop()
        self._start()
        return ended

    def stop(self) -> None:
        """End the process, whatever it is at."""
        self._process.kill()
        self._process.join()


def names(kinds: Iterable[str], seed: int) -> Iterator[str]:
    """Names of cases without end, the kinds in turn."""
    kinds = tuple(kinds)
    return (name_of(kind, seed, number) for number in count() for kind in kinds)


def run_all(names: Iterable[str], kinds: tuple[str, ...], limits: Limits, jobs: int) -> Iterator[Outcome]:
    """The outcomes of the cases, as they end, from so many children at once."""
    waiting, lock, done = iter(names), Lock(), Queue[Outcome | BaseException | None]()

    def work() -> None:
        child = None
        try:
            child = Child(kinds, limits)
            while True:
                with lock:
                    name = next(waiting, None)
                if name is None:
                    break
                done.put(child.run(name))
        except BaseException as error:
            done.put(error)
        finally:
            if child is not None:
                child.stop()
            done.put(None)

    for _ in range(jobs):
        Thread(target=work, daemon=True).start()
    working = jobs
    while working:
        ended = done.get()
        if isinstance(ended, Outcome):
            yield ended
        elif ended is None:
            working -= 1
        else:
            raise ended
