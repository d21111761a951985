"""What a run needs beside the weights, as arithmetic, and the weight format that leaves room for it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from ..loading.build import ModelPlan
from ..model.config import NextStepConfig
from ..model.kv_cache import KVCache
from ..runtime.memory import format_bytes
from ..runtime.quantization import RECIPES

log = logging.getLogger(__name__)

# Of the weights as they are, then of the recipes, the first that fits is taken: each loses more than the one before.
AUTO, AUTOMATIC = "auto", (None, "int8", "int4")
# The published VAE's weights in bfloat16, and what decoding 512x512 takes at its largest layer.
VAE_BYTES = 1_500_000_000
FEWEST = 64  # positions in one call; fewer would save next to nothing


@dataclass(frozen=True)
class RunSize:
    """What a run's memory depends on: rows of the transformer's batch, the positions of their prompt and in all, how
    many are fed in one call, the flow steps, and how many tokens of a picture are drawn in one call."""

    rows: int
    length: int
    fed_at_once: int
    steps: int
    drawn_at_once: int = 1


@dataclass(frozen=True)
class Piece:
    """How much is done at once: so many pictures, and so many positions of what is known beforehand."""

    pictures: int
    positions: int

    def __str__(self) -> str:
        return f"{self.pictures} picture{'s' if self.pictures > 1 else ''} and {self.positions} positions"

    def halved(self, longest: int) -> Piece | None:
        """The next smaller piece where `longest` positions are the most there are; None where it cannot be smaller."""
        if self.pictures > 1:
            return replace(self, pictures=-(-self.pictures // 2))
        positions = min(self.positions, longest)
        return None if positions <= FEWEST else replace(self, positions=max(FEWEST, -(-positions // 2)))


# A picture of 512x512 with guidance, a long prompt and the published number of steps.
PICTURE_512 = RunSize(rows=2, length=1280, fed_at_once=256, steps=50)


def working_bytes(config: NextStepConfig, size: RunSize, dtype: torch.dtype) -> int:
    """Bytes of the KV cache, of the activations of one call, and of the head's modulations for all steps."""
    # At its widest a layer holds, for every position of the call, residual, norm, queries, keys, values and attention's
    # result, about eight times hidden in all, and the MLP's gate, up and their product. Layers follow one another, so
    # one layer counts.
    activations = size.rows * size.fed_at_once * (8 * config.hidden_size + 3 * config.intermediate_size)
    # Kernels that keep no scores need less; which one runs depends on device and version, so all of them are counted.
    scores = size.rows * config.num_attention_heads * size.fed_at_once * size.length
    # The modulations: three vectors a block and two for the last layer, for every step and one more (a grid of n steps
    # may have n + 1 times).
    head = size.rows * size.drawn_at_once * (size.steps + 1) * (3 * config.fm_head_layers + 2) * config.fm_head_dim
    cache = KVCache.bytes_needed(config, size.rows, size.length, dtype)
    return cache + (activations + scores + head) * dtype.itemsize


def fitting_recipe(
    plan: ModelPlan, storage: torch.dtype, compute: torch.dtype, room: int, vae: int = VAE_BYTES
) -> str | None:
    """The recipe for a device with `room` bytes in all: as they are (None), int8 or int4, the first that leaves room
    for a 512x512 picture and its VAE; int4 where none does, since it needs the least streaming.

    What a GGUF file holds is as it is in the recipe that is nearest to it. Weights lie in `storage`, the KV cache and
    the activations in `compute`. A card without bfloat16 units keeps the weights in it all the same and computes in
    float32. `vae` is what the VAE takes.
    """
    beside = working_bytes(plan.config, PICTURE_512, compute) + vae
    choices = AUTOMATIC if plan.recipe is None or plan.stored else (plan.recipe.name, AUTOMATIC[-1])
    fitting = (name for name in choices if plan.weight_bytes(name, storage) + beside <= room)
    return next(fitting, choices[-1])


def with_fitting_recipe(
    plan: ModelPlan, storage: torch.dtype, compute: torch.dtype, room: int | None, vae: int = VAE_BYTES
) -> ModelPlan:
    """The plan with weights in the format that fits `room`; as it is without a room to fit, as on a CPU, and where
    they are stored in a format already."""
    if room is None or plan.stored:
        return plan
    name = fitting_recipe(plan, storage, compute, room, vae)
    log.info("NextStep: quantization auto takes %s for a card of %s", name or "none", format_bytes(room))
    return plan if name is None else replace(plan, recipe=RECIPES[name])
