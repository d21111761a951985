"""Where pictures wait: a line with an end, from which those that are alike are drawn together.

Whoever waits may leave, and frees the place. What is being drawn for nobody any more is stopped. A picture whose
worker is lost is drawn once more, alone; one that costs a second worker has failed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from contextlib import aclosing, suppress
from typing import Any

from ...errors import NextStepError
from ...ranges import Range
from ...sentences import Sentence

Event = dict[str, Any]  # of a picture, by its number in a batch: see `replica`
Draw = Callable[[Sequence[Any]], AsyncGenerator[Event, None]]
PLACES = Range("--queue", 1, 10_000)
GATHER_SECONDS = 0.02  # after the first of a batch, for those that were sent at the same time
TRIES = 2  # that a picture is worth, in workers
log = logging.getLogger(__name__)


class Full(NextStepError):
    """There is no place left."""


class Lost(Exception):
    """The worker that drew a batch is gone."""


class Picture:
    """A picture in the line. `events` are what became of it so far: partial pictures, and at the end the whole or an
    error."""

    def __init__(self, data: Any, alike: Hashable) -> None:
        self.data, self.alike = data, alike
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.lost, self.is_done, self.has_left = 0, False, False

    def tell(self, event: Event) -> None:
        """Take in what became of it."""
        self.is_done |= event["kind"] in ("done", "error")
        self.events.put_nowait(event)


class Line:
    """Pictures that wait for one of `workers`, at most `places` of them, and `together` in a batch; `draw` draws one,
    and raises Lost."""

    def __init__(self, draw: Draw, workers: int, places: int, together: int) -> None:
        self._draw, self._workers, self.places, self.together = draw, workers, places, together
        self._waiting: list[Picture] = []
        self._someone = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.sizes: list[int] = []  # of the batches so far, the last few

    def start(self) -> None:
        """Begin to draw; within a running event loop."""
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self._workers)]

    async def stop(self) -> None:
        """Let whatever is being drawn go."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task

    @property
    def waiting(self) -> int:
        """Pictures that wait."""
        return len(self._waiting)

    def join(self, pictures: Sequence[Picture]) -> None:
        """Take places for these, or for none of them: Full."""
        if len(self._waiting) + len(pictures) > self.places:
            raise self.full()
        self._waiting += pictures
        self._someone.set()

    def full(self) -> Full:
        """The error for whoever comes when there is no place."""
        said = Sentence(
            "{count} pictures wait already, and there are {places} places. Try again later.",
            count=len(self._waiting),
            places=self.places,
        )
        return Full.of(said)

    def leave(self, pictures: Sequence[Picture]) -> None:
        """Nobody wants these any more."""
        for picture in pictures:
            picture.has_left = True
        self._waiting = [picture for picture in self._waiting if not picture.has_left]

    async def _work(self) -> None:
        while True:
            while not self._waiting:
                self._someone.clear()
                await self._someone.wait()
            await asyncio.sleep(GATHER_SECONDS)
            if batch := self._take():
                await self._draw_batch(batch)

    def _take(self) -> list[Picture]:
        """The first picture, and those that are drawn with it."""
        if not self._waiting:
            return []
        first = self._waiting[0]
        alike = [first] if first.lost else [p for p in self._waiting if p.alike == first.alike and not p.lost]
        batch = alike[: self.together]
        self._waiting = [picture for picture in self._waiting if picture not in batch]
        self.sizes = [*self.sizes[-99:], len(batch)]
        return batch

    async def _draw_batch(self, batch: list[Picture]) -> None:
        reason = ""
        try:
            async with aclosing(self._draw([picture.data for picture in batch])) as events:
                async for event in events:
                    batch[event["picture"]].tell(event)
                    if all(picture.is_done or picture.has_left for picture in batch):
                        break
        except Lost as error:
            reason = str(error)
        except Exception as error:  # of whatever draws; the line goes on
            log.warning("A batch failed: %s", error)
            reason = type(error).__name__
        for picture in reversed(batch):
            if picture.is_done or picture.has_left:
                continue
            picture.lost += 1
            if picture.lost < TRIES:
                self._waiting.insert(0, picture)  # it had its place
                self._someone.set()
                continue
            said = NextStepError(
                "{count} workers were lost while they drew it, so it is left out ({reason}).",
                count=TRIES,
                reason=reason or "ended early",
            )
            picture.tell({"kind": "error", "picture": 0, "error": said.sentence.as_data(), "ours": True})
