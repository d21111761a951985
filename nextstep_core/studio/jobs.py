"""What is to be drawn: single pictures with all their settings, and the whole job of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from ..sampling.settings import GenerationSettings
from ..sentences import Words
from .names import DEFAULT_PATTERN

BASE = 512  # pixels, of pictures whose size a job does not state: what the authors recommend


@dataclass(frozen=True)
class Asked:
    """Settings as a job states them; None is what the checkpoint was published with. `label` names them beside
    others."""

    label: str = ""
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    cfg: float | None = None
    cfg_img: float | None = None
    cfg_schedule: str | None = None
    shift: float | None = None
    sampler: str | None = None
    use_norm: bool | None = None
    lookahead: str | None = None
    steps_schedule: str | None = None
    negative_prompt: str = ""

    def over(self, published: GenerationSettings) -> GenerationSettings:
        """These settings over those that a checkpoint was published with; NextStepError when they make no sense."""
        names = [f.name for f in fields(GenerationSettings)]
        return published.override(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Order:
    """One picture to draw. `images` are input pictures for the prompt's slots; `where` is what a message calls it."""

    prompt: str
    negative_prompt: str
    images: tuple[Path, ...]
    asked: Asked
    seed: int
    name: str
    where: Words

    @property
    def editing(self) -> bool:
        """Whether a picture is edited."""
        return bool(self.images)


@dataclass(frozen=True)
class BatchJob:
    """A whole job: every picture in its order, and how files are written. `model` is None where none is named."""

    title: str
    orders: tuple[Order, ...]
    model: str | None = None
    format: str = "png"
    quality: int = 90
    pattern: str = DEFAULT_PATTERN

    @property
    def labels(self) -> list[str]:
        """The names of its settings, where it compares several."""
        return list(dict.fromkeys(order.asked.label for order in self.orders if order.asked.label))
