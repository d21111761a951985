"""How long a picture will take on a device, without its weights: one layer and the head are timed as they would run.

The layer, the head and the VAE have the checkpoint's shapes and the format that its weights will have, and numbers that
mean nothing, since they do not change the cost. All layers are alike, so one is timed, and counts as often as there are
layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import nn

from ..images.tiling import SIDES
from ..loading.build import make_ready
from ..model.config import NextStepConfig, VAEConfig
from ..model.kv_cache import bucketed
from ..model.nextstep import NextStepModel
from ..model.vae import AutoencoderKL
from ..runtime.bandwidth import timed
from ..runtime.graphs import StepGraphs
from ..runtime.quantization import quantize_model
from ..sampling.settings import GenerationSettings
from .steps import StepCaches, StepShape

Module = TypeVar("Module", bound=nn.Module)

PROMPT = 40  # tokens, of a sentence or two
RUNS = 3  # of each part, the fastest of which counts
NUMBER = 0.01  # every weight; not zero, whose pages a system may share
COPIED = 1 << 26  # bytes
SMALL_PIECE = 128  # pixels of the VAE's side, where a processor computes; a card is only busy with more


@dataclass(frozen=True)
class Estimate:
    """Seconds of one picture: its prompt, each of its `tokens`, what is streamed for each of them, and the VAE."""

    tokens: int
    prompt: float
    token: float
    streaming: float
    vae: float

    @property
    def picture(self) -> float:
        """All of it. What is streamed comes while the layers compute, so the slower of the two counts."""
        return self.prompt + self.tokens * max(self.token, self.streaming) + self.vae


@torch.inference_mode()
def estimate(
    config: NextStepConfig,
    vae: VAEConfig | None,
    settings: GenerationSettings,
    height: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    recipe: str | None = None,
    streamed: int = 0,
) -> Estimate:
    """The estimate for a picture of `height` x `width` pixels by weights stored in `recipe`, of which `streamed` bytes
    come from the host for every token. Takes the memory of one layer, the head and the VAE while it lasts."""
    side = config.latent_patch_size * (8 if vae is None else vae.downscale)
    tokens = (height // side) * (width // side)
    prompt, token = _transformer_and_head(config, settings, tokens, device, dtype, recipe)
    return Estimate(
        tokens,
        prompt,
        token,
        0.0 if not streamed else streamed / copy_rate(device),
        0.0 if vae is None else _vae(vae, height, width, device, dtype),
    )


def _transformer_and_head(
    config: NextStepConfig,
    settings: GenerationSettings,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    recipe: str | None,
) -> tuple[float, float]:
    """Seconds of the prompt and of one token."""
    one = replace(config, num_hidden_layers=1, use_gen_pos_embed=False)
    model = _meaningless(NextStepModel(one, dtype=dtype, device="meta"), device)
    if recipe is not None:
        quantize_model(model, recipe, device)
    make_ready(model, device, dtype)
    branches = 2 if settings.cfg > 1 else 1
    shape = StepShape(
        branches,
        branches,
        bucketed(PROMPT + tokens),
        settings.sampler,
        settings.steps,
        settings.shift,
        settings.use_norm,
        device,
        dtype,
    )
    sequence, sample = StepCaches(StepGraphs(model)).steps(model, shape)
    embeds = torch.full((branches, PROMPT, config.hidden_size), NUMBER, device=device, dtype=dtype)
    valid = torch.ones(branches, PROMPT, dtype=torch.bool, device=device)
    noise = torch.randn(sample.noise_count, 1, config.token_dim, device=device)
    guidance = torch.ones(2, device=device)
    prompt = fastest(device, lambda: sequence.prefill(embeds, valid, None, ""))
    hidden = sequence.prefill(embeds, valid, None, "")
    mean = round(sum(settings.step_counts(tokens)) / tokens)  # the head's time grows evenly with the steps
    head = fastest(device, lambda: sample(hidden, noise, guidance, mean))
    token = sample(hidden, noise, guidance)[:, None]
    middle = max(0, tokens // 2 - 1)
    layer = fastest(device, lambda: sequence.feed(token, middle))
    return config.num_hidden_layers * prompt, config.num_hidden_layers * layer + head


def _vae(config: VAEConfig, height: int, width: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of decoding a picture, from a piece of it."""
    vae = _meaningless(AutoencoderKL(config, dtype=dtype, device="meta"), device)
    most = SMALL_PIECE if device.type == "cpu" else SIDES[0]
    rows, columns = (min(side, most) // config.downscale for side in (height, width))
    latents = torch.full((1, config.z_channels, rows, columns), NUMBER, device=device, dtype=dtype)
    seconds = fastest(device, lambda: vae.decode(latents))
    return seconds * height * width / (rows * columns * config.downscale**2)


def _meaningless(module: Module, device: torch.device) -> Module:
    module = module.to_empty(device=device).eval().requires_grad_(False)
    for weight in module.parameters():
        weight.fill_(NUMBER)
    return module


def fastest(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs, after one that does not count."""
    work()
    return min(timed(device, work)[0] for _ in range(RUNS))


def copy_rate(device: torch.device) -> float:
    """Bytes per second from the host to a device, from memory that it may fetch by itself."""
    source = torch.ones(COPIED, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(COPIED, dtype=torch.uint8, device=device)
    return COPIED / fastest(device, lambda: target.copy_(source, non_blocking=True))
