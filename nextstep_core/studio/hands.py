"""Whoever draws the batches of a run: one model here, or many elsewhere. All make the same files in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

from torch import Tensor

from ..decoding.progress import Progress
from ..errors import NextStepError
from ..images.saving import encoded_picture
from ..runtime.interrupt import Check
from .drawing import Artist, Settled, parameters_of
from .jobs import Order
from .planning import Batch, Entry

Scorer = Callable[[Tensor], Mapping[str, float]]
Tell = Callable[[Progress], None]


@dataclass(frozen=True)
class FileKind:
    """How pictures are written: one of FORMATS, and its quality."""

    format: str
    quality: int


@dataclass(frozen=True)
class Finished:
    """A picture of a batch, by its place in it: the bytes of its file, or the `error` that there is instead. `seconds`
    are its share of the time of all that were drawn with it."""

    place: int
    data: bytes = b""
    seconds: float = 0.0
    scores: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


Pictures: TypeAlias = Generator[tuple[Entry, Finished], None, None]


class Hands(Protocol):
    """Draws batches. `facts` name the model, and `identity` changes when its pictures would."""

    facts: dict[str, str]
    identity: str

    def settle(self, orders: Sequence[Order]) -> list[Settled]:
        """What orders come to; NextStepError for what the checkpoint cannot draw."""

    def draw(self, batches: Sequence[Batch], kind: FileKind, tell: Tell, check: Check) -> Pictures:
        """The wanted pictures of all batches, as they come. `tell` may be called with how far a batch is; it and
        `check` stop the work by raising."""


class Alone:
    """One artist, a batch after another."""

    def __init__(self, artist: Artist, score: Scorer | None = None) -> None:
        self.artist, self.score = artist, score
        self.facts, self.identity = artist.facts, artist.identity

    def settle(self, orders: Sequence[Order]) -> list[Settled]:
        return [self.artist.settle(order) for order in orders]

    def draw(self, batches: Sequence[Batch], kind: FileKind, tell: Tell, check: Check) -> Pictures:
        for batch in batches:
            for one in finish(self.artist, batch.orders, batch.wanted, kind, self.score, tell, check):
                yield batch.entries[one.place], one


def finish(
    artist: Artist,
    orders: Sequence[Settled],
    wanted: Sequence[int],
    kind: FileKind,
    score: Scorer | None,
    tell: Tell,
    check: Check,
) -> Iterator[Finished]:
    """Draw a batch whole, and make files of those that are wanted; where drawing fails, each of those alone."""
    started = time.monotonic()
    try:
        pictures = artist.draw(orders, tell, check)
    except NextStepError as error:
        if len(orders) == 1:
            yield Finished(0, error=str(error))
            return
        for n in wanted:
            for one in finish(artist, [orders[n]], [0], kind, score, tell, check):
                yield replace(one, place=n)
        return
    seconds = (time.monotonic() - started) / len(orders)
    for n in wanted:
        scores = {} if score is None else dict(score(pictures[n]))
        parameters = parameters_of(orders[n], artist.facts)
        yield Finished(n, encoded_picture(pictures[n], kind.format, kind.quality, parameters), seconds, scores)
