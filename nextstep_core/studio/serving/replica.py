"""One model in a process of its own, which draws batches and tells of each picture while it does.

What goes in and out is plain data. Events are {"picture": its number in the batch, "kind": ...}: "progress" now and
then, "partial" with the bytes of a file and its index, and at last "done" with those of the whole picture or "error"
with a sentence, and "ours" where it is no fault of the request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import torch

from ...decoding.progress import Progress
from ...errors import NextStepError
from ...images.saving import encoded_picture
from ...runtime.interrupt import Check
from ..drawing import Artist, Settled
from ..hands import FileKind, finish
from ..model_choice import prepare
from ..worker import Data, Maker, as_orders

PROGRESS_SECONDS = 0.2
END: Data = {}


class Stopped(Exception):
    """Nobody wants the batch any more."""


class Replica:
    """Finds and reads the model of a `choice`; `maker` finds it where it is not `model_choice.prepare`."""

    def __init__(self, maker: Maker | None, choice: Data) -> None:
        if not torch.cuda.is_available():
            torch.set_num_threads(1)  # each has a core to itself
        self._artist: Artist = (maker or prepare)(choice).load()
        self._free = asyncio.Lock()

    async def draw(self, pictures: Sequence[Data]) -> AsyncGenerator[Data, None]:
        """Draw pictures that can be drawn in one batch; stops when whoever asked goes away."""
        loop, events, stop = asyncio.get_running_loop(), asyncio.Queue[Data](), Event()

        def tell(event: Data) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def check() -> None:
            if stop.is_set():
                raise Stopped

        def work() -> None:
            try:
                draw_batch(self._artist, pictures, tell, check)
            except Stopped:
                pass
            finally:
                tell(END)

        async with self._free:
            drawing = asyncio.create_task(asyncio.to_thread(work))
            try:
                while (event := await events.get()) is not END:
                    yield event
            finally:
                stop.set()
                await asyncio.shield(drawing)


def draw_batch(artist: Artist, pictures: Sequence[Data], tell: Callable[[Data], None], check: Check) -> None:
    """Draw a batch and tell of it. One that the model cannot draw is told as an error, and the others are drawn."""
    with as_orders([one["order"] for one in pictures]) as orders:
        settled: dict[int, Settled] = {}
        for n, order in enumerate(orders):
            try:
                settled[n] = artist.settle(order)
            except NextStepError as error:
                tell({"picture": n, "kind": "error", "error": error.sentence.as_data()})
        if not settled:
            return
        kind = FileKind(**pictures[0]["kind"])
        numbers = list(settled)
        wishes = [pictures[n]["partial_images"] for n in numbers]

        def of_batch(n: int, event: Data) -> None:
            tell({"picture": numbers[n], **event})

        partials = Partials(artist, list(settled.values()), wishes, kind, of_batch)
        batch = list(settled.values())
        for one in finish(artist, batch, range(len(batch)), kind, None, partials, check):
            if one.error:
                said = NextStepError("{reason}", reason=one.error)
                tell({"picture": numbers[one.place], "kind": "error", "error": said.sentence.as_data(), "ours": True})
            else:
                tell({"picture": numbers[one.place], "kind": "done", "data": one.data})


@dataclass
class Partials:
    """Called with how far a batch is: tells so, and shows the pictures that want to be seen before they are done."""

    artist: Artist
    batch: list[Settled]
    wishes: list[int]
    kind: FileKind
    tell: Callable[[int, Data], None]
    shown: list[int] = field(default_factory=list)
    told: float = 0.0

    def __call__(self, progress: Progress) -> None:
        self.shown = self.shown or [0] * len(self.batch)
        if time.monotonic() - self.told > PROGRESS_SECONDS:
            self.told = time.monotonic()
            for n in range(len(self.batch)):  # a stream waits for each
                self.tell(n, {"kind": "progress", "done": progress.done, "total": progress.total})
        look: Any = getattr(self.artist, "look", None)
        if look is None or len(progress.tokens) != len(self.batch):  # drawn one by one, after the batch failed
            return
        share = progress.step.done / progress.step.total
        due = [
            n
            for n in range(progress.start, progress.stop)
            if self.shown[n] < self.wishes[n] and share >= (self.shown[n] + 1) / (self.wishes[n] + 1)
        ]
        if not due or share == 1:
            return
        pictures = look(self.batch[0], progress)
        for n in due:
            data = encoded_picture(pictures[n], self.kind.format, self.kind.quality)
            self.tell(n, {"kind": "partial", "index": self.shown[n], "data": data})
            self.shown[n] += 1
