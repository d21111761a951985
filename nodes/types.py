"""Our socket types and the values that travel through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..nextstep_core.decoding.engine import NextStepEngine
from ..nextstep_core.images.placement import Placement
from ..nextstep_core.request.layout import Caption
from .host import stays_cached

CATEGORY = "NextStep"

ModelSocket = io.Custom("NEXTSTEP_MODEL")
PromptSocket = io.Custom("NEXTSTEP_PROMPT")
OriginalSocket = io.Custom("NEXTSTEP_ORIGINAL")


@dataclass(eq=False)
class HostModel:
    """A loaded checkpoint under the host's memory management.

    The patcher owns where the weights are; dtype is the one to compute in. `vae` is the one that goes with the
    checkpoint as a native VAE, or None where there is none; `rgb_map` is fitted to it before a run that shows previews.
    `facts` are what pictures tell of the model they were drawn by.
    """

    engine: NextStepEngine
    patcher: Any
    dtype: torch.dtype
    vae: Any
    facts: dict[str, str]
    rgb_map: Tensor | None = None

    def is_dynamic(self) -> bool:
        """Asked by the host's cache of a loader's outputs."""
        return stays_cached()


@dataclass(frozen=True)
class PromptValue:
    """Captions as the model reads them, each with the images for its slots. Several make a batch of pictures."""

    captions: tuple[Caption, ...]

    @property
    def editing(self) -> bool:
        """Whether there is an input image."""
        return any(caption.images for caption in self.captions)


@dataclass(frozen=True, eq=False)
class Original:
    """Pictures (B, H, W, 3) in [0, 1] as they came, and where the part that is drawn belongs in them.

    `mask` (B, h, w) is the one on the canvas, or None where all of it is drawn.
    """

    pictures: Tensor
    placement: Placement
    mask: Tensor | None
