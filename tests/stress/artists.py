"""Models for the workers of a cluster in tests: a stub, and the embedded model with prompts that do harm."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextstep_core import NextStepError
from nextstep_core.decoding.progress import Progress
from nextstep_core.runtime.interrupt import Check
from nextstep_core.sampling.settings import GenerationSettings
from nextstep_core.studio.drawing import Artist, Settled
from nextstep_core.studio.jobs import Order
from nextstep_core.studio.model_choice import prepare

SIDE = 16
KILLS = "kill the worker"  # in a prompt
UNLUCKY = "kill two workers, as counted in "  # and a file, where several are drawn together
FAILS, SLOW = "fail", "slow"
TOGETHER = "together"  # in a prompt of a stub: as gray as there are pictures in the batch


@dataclass(frozen=True)
class Stub:
    """Draws flat pictures whose gray is the seed; `facts` and `identity` as they are asked for."""

    facts: dict[str, str]
    identity: str

    def load(self) -> Stub:
        return self

    def settle(self, order: Order) -> Settled:
        if "impossible" in order.prompt:
            raise NextStepError("{where}: It is impossible.", where=order.where)
        settings = order.asked.over(GenerationSettings(sampler="flow-ode"))
        return Settled(order, order.prompt, order.asked.width or SIDE, order.asked.height or SIDE, settings)

    def draw(self, orders: Sequence[Settled], report: Callable[[Progress], None], check: Check) -> Tensor:
        check()
        harm(orders)
        grays = [len(orders) if TOGETHER in one.prompt else one.order.seed % 256 for one in orders]
        return torch.stack([torch.full((o.height, o.width, 3), gray / 255) for o, gray in zip(orders, grays)])


def harm(orders: Sequence[Settled]) -> None:
    """What the prompts of a batch do to the one that draws it."""
    if any(KILLS in one.prompt for one in orders):
        os._exit(1)
    for counted in (Path(one.prompt.partition(UNLUCKY)[2]) for one in orders if UNLUCKY in one.prompt):
        if len(orders) > 1 and len(before := counted.read_text() if counted.exists() else "") < 2:
            counted.write_text(before + "x")
            os._exit(1)
    if any(FAILS in one.prompt for one in orders):
        raise NextStepError("It does not work.")
    if any(SLOW in one.prompt for one in orders):
        time.sleep(0.3)


def stub(choice: dict[str, Any]) -> Stub:
    """What a worker draws with; `choice` may state another identity, or an error."""
    if "error" in choice:
        raise NextStepError("{what} is not here.", what=choice["error"])
    if choice.get("dies"):
        os._exit(1)
    own = f" {os.getpid()}" if choice.get("each its own") else ""
    return Stub({"Model": "stub", "Version": "0"}, f"stub{own}")


class Harmed:
    """An artist on whose prompts there may be harm."""

    def __init__(self, artist: Artist) -> None:
        self.artist, self.facts, self.identity = artist, artist.facts, artist.identity

    def settle(self, order: Order) -> Settled:
        return self.artist.settle(order)

    def draw(self, orders: Sequence[Settled], report: Callable[[Progress], None], check: Check) -> Tensor:
        harm(orders)
        return self.artist.draw(orders, report, check)


@dataclass(frozen=True)
class Embedded:
    """The model of a choice, harmed."""

    prepared: Any

    @property
    def facts(self) -> dict[str, str]:
        return self.prepared.facts

    @property
    def identity(self) -> str:
        return self.prepared.identity

    def load(self) -> Harmed:
        return Harmed(self.prepared.load())


def embedded(choice: dict[str, Any]) -> Embedded:
    return Embedded(prepare(choice))
