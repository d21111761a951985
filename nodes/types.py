"""Our socket types and the values that travel through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..nextstep_core.decoding.engine import NextStepEngine
from ..nextstep_core.model.config import VAEConfig
from ..nextstep_core.request.layout import Caption

CATEGORY = "NextStep"

ModelSocket = io.Custom("NEXTSTEP_MODEL")
PromptSocket = io.Custom("NEXTSTEP_PROMPT")

# Scale and shift of the published tokenizer, for a checkpoint that comes without its VAE.
PUBLISHED_VAE = VAEConfig(
    ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=16, scaling_factor=1.0, shift_factor=0.0
)


@dataclass(eq=False)
class HostModel:
    """A loaded checkpoint under the host's memory management.

    The patcher owns where the weights are; dtype is the one to compute in. `vae` is the one that goes with the
    checkpoint as a native VAE, or None where there is none; `rgb_map` is fitted to it when the first preview is due.
    """

    engine: NextStepEngine
    patcher: Any
    dtype: torch.dtype
    vae: Any
    vae_config: VAEConfig
    rgb_map: Tensor | None = None


@dataclass(frozen=True)
class PromptValue:
    """Captions as the model reads them, each with the images for its slots. Several make a batch of pictures."""

    captions: tuple[Caption, ...]

    @property
    def editing(self) -> bool:
        """Whether there is an input image."""
        return any(caption.images for caption in self.captions)
