"""What a pipeline may take of its device, and what that means: where weights lie, and how much is done at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..images.tiling import SIDES, pixel_bytes
from ..loading.build import ModelPlan
from ..model.config import NextStepConfig, VAEConfig
from ..model.nextstep import NextStepModel
from ..model.vae import AutoencoderKL
from ..runtime.cpu import PackedLinear
from ..runtime.devices import room_bytes, total_bytes
from ..runtime.memory import THE_DEVICE_HAS, MemoryPlan, plan_memory, plan_within
from ..runtime.placement import HOST, held_bytes
from ..runtime.streaming import passing_bytes, streamed_bytes
from ..sentences import Sentence
from .memory import PICTURE_512, RunSize, with_fitting_recipe, working_bytes

SMALLEST = RunSize(rows=1, length=1, fed_at_once=1, steps=1)
CHANNELS = 3


@dataclass(frozen=True)
class Budget:
    """The memory of `device` that weights, a run and the VAE share, computing in `dtype`: `limit` bytes, or what there
    is where that is None. `vae_weights` of them are taken by the VAE's weights, which stay on the device."""

    device: torch.device
    limit: int | None
    dtype: torch.dtype
    vae: VAEConfig
    vae_weights: int

    @classmethod
    def of(cls, device: torch.device, limit: int | None, dtype: torch.dtype, vae: AutoencoderKL) -> Budget:
        """The budget beside a loaded VAE."""
        return cls(device, limit, dtype, vae.config, sum(weight.nbytes for weight in vae.parameters()))

    def room(self, held: int = 0) -> int | None:
        """Bytes for the model's weights and its run, `held` of which are taken by weights already; None where nobody
        can tell."""
        free = None if self.device.type == "cpu" else room_bytes(self.device)
        bounds = [] if free is None else [free + held]
        if self.limit is not None:
            bounds.append(self.limit - self.vae_weights)
        return min(bounds, default=None)

    def vae_bytes(self, height: int, width: int, pictures: int = 1) -> int:
        """What the VAE takes beside its weights for pictures of this size: a piece of the side that it was trained at,
        or less, and what has come out already."""
        piece = min(height, SIDES[0]) * min(width, SIDES[0])
        return pixel_bytes(self.vae, self.dtype) * piece + self._results(height, width, pictures)

    def pixels_at_once(self, held: int, height: int, width: int, pictures: int = 1) -> int | None:
        """How many pixels the VAE may be given at once beside `held` bytes of weights; None where memory that runs out
        will tell."""
        room = self.room(held)
        if self.limit is None or room is None:
            return None
        left = room - held - self._results(height, width, pictures)
        return max(0, left) // pixel_bytes(self.vae, self.dtype)

    def _results(self, height: int, width: int, pictures: int) -> int:
        """Pictures as the VAE hands them out: in pieces, put together, and as floats."""
        each = 2 * self.dtype.itemsize + torch.float32.itemsize
        return pictures * height * width * CHANNELS * each

    def with_recipe(self, plan: ModelPlan) -> ModelPlan:
        """The plan with its weights in the first format that fits, by what the device has in all and not by what is
        free at the moment; a CPU without a limit keeps what the file has."""
        there = None if self.device.type == "cpu" else total_bytes(self.device)
        vae = self.vae_weights + self.vae_bytes(*(SIDES[0],) * 2)
        return with_fitting_recipe(plan, self.dtype, self.dtype, there if self.limit is None else self.limit, vae)

    def home(self, sizes: Mapping[str, int], config: NextStepConfig) -> torch.device:
        """Where a model with tensors of these sizes is loaded to: the device where all of it fits beside a picture of
        512x512, else the host. NextStepError when not even the smallest picture would find room."""
        weights = sum(sizes.values())
        self._plan(weights, passing_bytes(sizes), 1, working_bytes(config, SMALLEST, self.dtype))
        beside = max(working_bytes(config, PICTURE_512, self.dtype), self.vae_bytes(*(SIDES[0],) * 2))
        room = self.room()
        return self.device if room is None or weights + beside <= room else HOST

    def plan(self, model: NextStepModel, pictures: int, each: int, height: int, width: int) -> MemoryPlan | None:
        """The plan for pictures of this size, each with `each` bytes of working memory; None where nobody can tell.
        NextStepError when not even one fits."""
        vae, held = self.vae_bytes(height, width, pictures), held_bytes(model, self.device)
        return self._plan(model_bytes(model), streamed_bytes(model), pictures, each, vae, held)

    def _plan(
        self, weights: int, streamed: int, pictures: int, each: int, vae: int = 0, held: int = 0
    ) -> MemoryPlan | None:
        room = self.room(held)
        if room is None:
            return None
        if self.device.type == "cpu":
            return plan_within(room, weights, pictures, each)
        whose = THE_DEVICE_HAS if self.limit is None else Sentence("max_memory leaves")
        return plan_memory(weights, room, pictures, each, streamed, spare=vae, whose=whose)


def model_bytes(model: NextStepModel) -> int:
    """Bytes of a model's weights, also of those that a CPU has in a layout of its own."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear))
    return sum(weight.nbytes for weight in model.parameters()) + packed * torch.float32.itemsize
