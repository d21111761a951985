"""What a pipeline may take of its device, and what that means: where weights lie, and how much is done at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..errors import NextStepError
from ..images.tiling import SIDES, pixel_bytes
from ..loading.build import ModelPlan
from ..model.config import NextStepConfig, VAEConfig
from ..model.nextstep import NextStepModel
from ..model.vae import AutoencoderKL
from ..runtime.cpu import PackedLinear
from ..runtime.devices import room_bytes, total_bytes
from ..runtime.memory import DEVICE_HAS, MemoryPlan, plan_memory, plan_within
from ..runtime.placement import HOST, held_bytes
from ..runtime.streaming import passing_bytes, streamed_bytes
from ..sentences import Sentence
from .memory import PICTURE_512, RunSize, with_fitting_recipe, working_bytes

SMALLEST = RunSize(rows=1, length=1, fed_at_once=1, steps=1)
TOKENS_512 = 1024  # of PICTURE_512; the rest of its length is the prompt
CHANNELS = 3


@dataclass(frozen=True)
class Fit:
    """What drawing with weights stored in `recipe` takes, in bytes: the weights, and all that is `needed` to stream
    nothing. `streamed` comes from the host for every token; None where it cannot be drawn at all."""

    recipe: str | None
    weights: int
    needed: int
    streamed: int | None


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
    def beside(cls, device: torch.device, limit: int | None, dtype: torch.dtype, vae: VAEConfig) -> Budget:
        """The budget as it will be beside a VAE of this shape."""
        empty = AutoencoderKL(vae, device="meta")
        return cls(device, limit, dtype, vae, sum(weight.numel() for weight in empty.parameters()) * dtype.itemsize)

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

    def fit(self, plan: ModelPlan, recipe: str | None, height: int, width: int) -> Fit:
        """Whether a checkpoint whose weights are stored in `recipe` (None: as they are) draws a picture of this size in
        `limit`, with guidance and a long prompt."""
        sizes = plan.tensor_bytes(recipe, self.dtype)
        side = plan.config.latent_patch_size * self.vae.downscale
        length = PICTURE_512.length - TOKENS_512 + (height // side) * (width // side)
        working = working_bytes(plan.config, replace(PICTURE_512, length=length), self.dtype)
        weights, vae = sum(sizes.values()), self.vae_bytes(height, width)
        needed = weights + max(working, vae) + self.vae_weights
        try:
            planned = self._plan(weights, passing_bytes(sizes), 1, max(working, vae), vae)
        except NextStepError:
            return Fit(recipe, weights, needed, None)
        return Fit(recipe, weights, needed, 0 if planned is None else weights - planned.resident)

    def plan(
        self, model: NextStepModel, pictures: int, each: int, height: int, width: int, beside: int = 0
    ) -> MemoryPlan | None:
        """The plan for pictures of this size, each with `each` bytes of working memory, and `beside` bytes for all
        together; None where nobody can tell. NextStepError when not even one fits."""
        vae, held = self.vae_bytes(height, width, pictures), held_bytes(model, self.device)
        return self._plan(model_bytes(model), streamed_bytes(model), pictures, each, vae, held, beside)

    def _plan(
        self, weights: int, streamed: int, pictures: int, each: int, vae: int = 0, held: int = 0, beside: int = 0
    ) -> MemoryPlan | None:
        room = self.room(held)
        if room is None:
            return None
        if self.device.type == "cpu":
            return plan_within(room - beside, weights, pictures, each)
        whose = DEVICE_HAS if self.limit is None else Sentence("max_memory leaves")
        return plan_memory(weights, room, pictures, each, streamed, spare=vae, whose=whose, beside=beside)


def model_bytes(model: NextStepModel) -> int:
    """Bytes of a model's weights."""
    return sum(tensor_bytes(model).values())


def tensor_bytes(model: NextStepModel) -> dict[str, int]:
    """Bytes of each of a model's weights, also of those that a CPU has in a layout of its own."""
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    own = {f"{name}.weight": layer.in_features * layer.out_features for name, layer in packed.items()}
    sizes = {name: weight.nbytes for name, weight in model.named_parameters()}
    return sizes | {name: numbers * torch.float32.itemsize for name, numbers in own.items()}
