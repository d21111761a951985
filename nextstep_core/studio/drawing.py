"""Orders to pictures by a model: what a batch run needs of it, and the pipeline as one that gives it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .. import __version__
from ..decoding.engine import NextStepEngine
from ..decoding.progress import Progress
from ..errors import NextStepError
from ..images.rgb import cover, seen_size, to_pixels
from ..pipeline import NextStepPipeline
from ..request.layout import IMAGE_SLOT
from ..request.parameters import PRODUCT, parameters_text
from ..request.sizes import nearest_ratio, ratio_size
from ..runtime.interrupt import Check
from ..runtime.lora import Stack
from ..sampling.settings import GenerationSettings
from .jobs import BASE, Order


@dataclass(frozen=True)
class Settled:
    """An order as a checkpoint will draw it: its text with every slot, its size in pixels, its settings."""

    order: Order
    prompt: str
    width: int
    height: int
    settings: GenerationSettings

    @property
    def together(self) -> tuple[object, ...]:
        """Orders of which this is equal can be drawn in one batch."""
        return self.width, self.height, self.settings, self.order.negative_prompt, len(self.order.images)

    def key(self, identity: str) -> str:
        """Tells pictures apart by all that they are made of; the same for the same picture in another run."""
        images = [sha256(path.read_bytes()).hexdigest() for path in self.order.images]
        drawn_as = [self.width, self.height, asdict(self.settings), self.order.seed]
        made_of = [identity, self.prompt, self.order.negative_prompt, images, drawn_as]
        return sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


def parameters_of(one: Settled, facts: Mapping[str, str]) -> str:
    """The text that a picture tells of itself, in the form that image browsers read."""
    size = one.width, one.height
    return parameters_text(
        one.prompt, one.order.negative_prompt, one.settings, seed=one.order.seed, size=size, facts=facts
    )


class Artist(Protocol):
    """A model that draws orders. `facts` name it, and `identity` changes when its pictures would."""

    facts: dict[str, str]
    identity: str

    def settle(self, order: Order) -> Settled:
        """What an order comes to; NextStepError for what this checkpoint cannot draw."""

    def draw(self, orders: Sequence[Settled], report: Callable[[Progress], None], check: Check) -> Tensor:
        """Pictures (M, H, W, 3) in [0, 1] of orders that can be drawn in one batch, each as it would come out alone."""


def identity_of(weights_hash: str, stored: str, dtype: torch.dtype, loras: Stack) -> str:
    """What an `Artist` is told apart by."""
    return " ".join(filter(None, (weights_hash, stored, str(dtype), loras.key)))


def with_version(facts: dict[str, str]) -> dict[str, str]:
    """Facts of a model, and by what it is run."""
    return {**facts, "Version": f"{PRODUCT} {__version__}"}


def settle(engine: NextStepEngine, order: Order) -> Settled:
    """The order under the checkpoint's published settings, and its size; NextStepError for what cannot be drawn."""
    settings = order.asked.over(engine.recommended(order.editing))
    width, height = _size(order)
    grid = engine.grid(height, width)
    text = order.prompt
    if order.images and IMAGE_SLOT not in text:
        text = IMAGE_SLOT * len(order.images) + text
    try:
        engine.check_prompt(text, [grid] * len(order.images), grid)
    except NextStepError as error:
        raise NextStepError("{where}: {reason}", where=order.where, reason=error) from None
    return Settled(order, text, width, height, settings)


def _size(order: Order) -> tuple[int, int]:
    asked = order.asked
    if asked.width and asked.height:
        return asked.width, asked.height
    if asked.width or asked.height:
        side = asked.width or asked.height or BASE
        return asked.width or side, asked.height or side
    if order.images:
        from PIL import Image

        with Image.open(order.images[0]) as image:
            return ratio_size(nearest_ratio(*seen_size(image)), BASE)
    return BASE, BASE


def read_picture(path: Path, width: int, height: int) -> Tensor:
    """A picture file as (H, W, 3) in [0, 1], cut to the size in which it is edited."""
    from PIL import Image

    with Image.open(path) as image:
        pixels = to_pixels(image).movedim(1, -1) / 2 + 0.5
    return cover(pixels, width, height)[0]


class PipelineArtist:
    """Draws with a pipeline."""

    def __init__(self, pipeline: NextStepPipeline, facts: dict[str, str], identity: str) -> None:
        self.pipeline, self.identity = pipeline, identity
        self.facts = with_version(facts)

    def settle(self, order: Order) -> Settled:
        return settle(self.pipeline.engine, order)

    def look(self, one: Settled, progress: Progress) -> Tensor:
        """The pictures of the batch that is being drawn, of which `one` is any, as far as they are drawn."""
        return self.pipeline.look(progress, one.height, one.width)

    def draw(self, orders: Sequence[Settled], report: Callable[[Progress], None], check: Check) -> Tensor:
        first = orders[0]
        images = [read_picture(path, first.width, first.height) for one in orders for path in one.order.images]
        settings = first.settings
        with torch.inference_mode():
            return self.pipeline.generate(
                [one.prompt for one in orders],
                negative_prompt=first.order.negative_prompt,
                images=images or None,
                height=first.height,
                width=first.width,
                cfg=settings.cfg,
                cfg_img=settings.cfg_img,
                cfg_schedule=settings.cfg_schedule,
                steps=settings.steps,
                shift=settings.shift,
                sampler=settings.sampler,
                use_norm=settings.use_norm,
                lookahead=settings.lookahead,
                steps_schedule=settings.steps_schedule,
                seed=[one.order.seed for one in orders],
                callback=report,
                check=check,
            ).images
