"""A server of pictures for tests, in this process, with a model that draws flat ones and is as slow as it is asked."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
import uvicorn
from PIL import Image
from torch import Tensor

from nextstep_core import NextStepError
from nextstep_core.decoding.progress import Progress, TokenStep
from nextstep_core.runtime.interrupt import Check
from nextstep_core.sampling.settings import GenerationSettings
from nextstep_core.studio.drawing import Settled
from nextstep_core.studio.jobs import Order
from nextstep_core.studio.serving.app import Server, Settings
from nextstep_core.studio.serving.line import Draw, Line
from nextstep_core.studio.serving.replica import Replica

TOKENS = 10
FLAT = Settings("flat")
SLOW, FAILS, IMPOSSIBLE = "slow", "fail", "impossible"  # in a prompt


@dataclass
class Flat:
    """Draws pictures that are gray by their seed; `drawn` counts tokens."""

    drawn: int = 0
    facts: Any = None
    identity: str = "flat"

    def __post_init__(self) -> None:
        self.facts = {"Model": "flat"}

    def load(self) -> Flat:
        return self

    def settle(self, order: Order) -> Settled:
        if IMPOSSIBLE in order.prompt:
            raise NextStepError("It is impossible.")
        settings = order.asked.over(GenerationSettings(sampler="flow-ode"))
        return Settled(order, order.prompt, order.asked.width or 16, order.asked.height or 16, settings)

    def draw(self, orders: Sequence[Settled], report: Callable[[Progress], None], check: Check) -> Tensor:
        if any(FAILS in one.prompt for one in orders):
            raise NextStepError("It does not work.")
        tokens = torch.zeros(len(orders), TOKENS, 1)
        for n in range(TOKENS):
            check()
            time.sleep(0.1 if any(SLOW in one.prompt for one in orders) else 0)
            self.drawn += 1
            report(Progress(TokenStep(n + 1, TOKENS, n + 1, TOKENS - n - 1, 1.0), 0, len(orders), tokens))
        return torch.stack([flat(one, one.order.seed % 256) for one in orders])

    def look(self, one: Settled, progress: Progress) -> Tensor:
        return torch.stack([flat(one, 255)] * len(progress.tokens))


def flat(one: Settled, gray: int) -> Tensor:
    return torch.full((one.height, one.width, 3), gray / 255)


def gray_of(data: bytes) -> tuple[tuple[int, int], int]:
    """The size of a flat picture, and its gray."""
    with Image.open(BytesIO(data)) as image:
        low, high = image.convert("L").getextrema()
        assert high - low <= 2, "not flat"
        return image.size, int(low)


def several(replicas: Sequence[Replica]) -> Draw:
    """A batch to whichever of these is free."""
    free = list(replicas)

    async def draw(pictures: Sequence[Any]) -> AsyncGenerator[Any, None]:
        one = free.pop()
        events = one.draw(pictures)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()
            free.append(one)

    return draw


@contextmanager
def served(
    draw: Draw, settings: Settings = FLAT, workers: int = 1, places: int = 100, together: int = 4
) -> Iterator[tuple[str, Line]]:
    """The address of a server, and its line."""
    line = Line(draw, workers, places, together)
    config = uvicorn.Config(Server(line, settings).app(), port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1", line
    finally:
        server.should_exit = True
        thread.join(20)
