"""One worker of a cluster: a model in a process of its own, somewhere.

What goes in and out is plain data, so that whoever sends work may hold this package under another name, as ComfyUI
does, and so that a worker of another version is told from its first answer. Nothing here knows what carries the data.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from .. import __version__
from ..decoding.progress import Progress
from ..errors import NextStepError
from ..runtime.interrupt import go_on
from ..sampling.settings import GenerationSettings
from .drawing import Artist, Settled
from .hands import FileKind, Finished, finish
from .jobs import Asked, Order
from .model_choice import prepare
from .quality import scores_of

Data = dict[str, Any]
Meters = Callable[[str, float], None]  # takes a name and how much it grows
ERROR = "error"


class Prepared(Protocol):
    """A model that was found but not read yet; see `model_choice.PreparedModel`."""

    @property
    def facts(self) -> dict[str, str]: ...

    @property
    def identity(self) -> str: ...

    def load(self) -> Artist:
        """Read it."""


Maker = Callable[[Data], Prepared]


class Worker:
    """Finds a model by a `choice`, loads it, draws with it. `maker` finds it where it is not `model_choice.prepare`."""

    def __init__(self, maker: Maker | None, choice: Data, meters: Meters = lambda *_: None) -> None:
        torch.set_num_threads(1)  # each has a core to itself, and another number of threads changes the last bits
        self._maker, self._choice, self._meters = maker or prepare, choice, meters
        self._prepared: Prepared | None = None
        self._artist: Artist | None = None

    def hello(self) -> Data:
        """Who this is. Asked before all else, and answered in a form that every version understands."""
        return {"host": socket.gethostname(), "pid": os.getpid(), "versions": versions()}

    def find(self) -> Data:
        """The model's facts and identity, without its weights; an error where it is not here."""
        try:
            self._prepared = found = self._maker(self._choice)
        except NextStepError as error:
            return {ERROR: error.sentence.as_data()}
        return {"facts": found.facts, "identity": found.identity}

    def load(self) -> Data:
        """Read the weights."""
        assert self._prepared is not None, "found first"
        try:
            self._artist = self._prepared.load()
        except NextStepError as error:
            return {ERROR: error.sentence.as_data()}
        return {"facts": self._artist.facts, "identity": self._artist.identity}

    def settle(self, orders: Sequence[Data]) -> Data:
        """What orders come to."""
        assert self._artist is not None, "loaded first"
        try:
            with as_orders(orders) as found:
                return {"settled": [settled_data(self._artist.settle(order)) for order in found]}
        except NextStepError as error:
            return {ERROR: error.sentence.as_data()}

    def draw(self, orders: Sequence[Data], settled: Sequence[Data], wanted: Sequence[int], kind: Data) -> list[Data]:
        """The wanted pictures of a batch."""
        assert self._artist is not None, "loaded first"
        started = time.monotonic()

        def count(progress: Progress) -> None:
            self._meters("tokens", progress.stop - progress.start)

        with as_orders(orders) as found:
            batch = [settled_of(one, order) for one, order in zip(settled, found, strict=True)]
            done = list(finish(self._artist, batch, wanted, FileKind(**kind), scores_of, count, go_on))
        failed = sum(bool(one.error) for one in done)
        self._meters("pictures", len(done) - failed)
        self._meters("failures", failed)
        self._meters("seconds", time.monotonic() - started)
        return [asdict(one) for one in done]


def versions() -> dict[str, str]:
    """What must be the same wherever pictures of one job are drawn."""
    return {"nextstep": __version__, "torch": torch.__version__.partition("+")[0]}


def order_data(order: Order) -> Data:
    """An order as plain data, with its pictures in it."""
    images = [(path.suffix, path.read_bytes()) for path in order.images]
    return {
        "prompt": order.prompt,
        "negative_prompt": order.negative_prompt,
        "images": images,
        "asked": asdict(order.asked),
        "seed": order.seed,
        "name": order.name,
        "where": str(order.where),
    }


@contextmanager
def as_orders(data: Sequence[Data]) -> Iterator[list[Order]]:
    """Orders whose pictures lie in files while they are needed."""
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for n, one in enumerate(data):
            paths = []
            for m, (suffix, content) in enumerate(one["images"]):
                paths.append(Path(folder) / f"{n}-{m}{suffix}")
                paths[-1].write_bytes(content)
            found.append(Order(**one | {"images": tuple(paths), "asked": Asked(**one["asked"])}))
        yield found


def settled_data(one: Settled) -> Data:
    """What an order came to, without the order."""
    return {"prompt": one.prompt, "width": one.width, "height": one.height, "settings": asdict(one.settings)}


def settled_of(data: Mapping[str, Any], order: Order) -> Settled:
    """The same with its order."""
    return Settled(order, data["prompt"], data["width"], data["height"], GenerationSettings(**data["settings"]))


def finished_of(data: Mapping[str, Any]) -> Finished:
    """A picture as a worker hands it back."""
    return Finished(**data)
