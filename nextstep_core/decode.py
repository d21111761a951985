"""The decode loop: prompt embeddings in, one image token after another out.

Knows tensors and the model, nothing of text, files, images or progress bars. `decode_tokens` is a generator, so its
caller shows progress, previews and stops between two tokens by what it does with each item.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .model.kv_cache import KVCache
from .model.nextstep import NextStepModel
from .model.positions import generation_codes, rotary_table
from .model.transformer import attention_mask
from .sampling.guidance import SCHEDULES, guide
from .sampling.noise import NoiseStream
from .sampling.solvers import ETA, SAMPLERS, normalize_token
from .settings import GenerationSettings

# Prompts run through the transformer in pieces of this many positions: it bounds the memory of masks and scores.
PREFILL_CHUNK = 1024


@dataclass(frozen=True)
class Progress:
    """State after a token: how many of `total` are done, and the buffer (M, total, token_dim), zero where undone."""

    done: int
    total: int
    tokens: Tensor


def prefill(model: NextStepModel, embeds: Tensor, valid: Tensor, rotary: Tensor, cache: KVCache) -> Tensor:
    """Run the prompt (B, L, hidden) through the transformer; the hidden state (B, hidden) of its last position."""
    hidden = embeds
    for start in range(0, embeds.shape[1], PREFILL_CHUNK):
        chunk = embeds[:, start : start + PREFILL_CHUNK]
        end = start + chunk.shape[1]
        hidden = model(chunk, rotary[:, start:end], attention_mask(valid, start, end - start), cache, start)
    return hidden[:, -1]


def step(
    model: NextStepModel, tokens: Tensor, mask: Tensor | None, rotary: Tensor, cache: KVCache, start: int
) -> Tensor:
    """Feed new tokens (B, T, token_dim), standing at start..start+T-1, back in; hidden states (B, T, hidden)."""
    return model(model.image_in_projector(tokens), rotary[:, start : start + tokens.shape[1]], mask, cache, start)


class TokenSampler:
    """Draws one token per image from the flow head, with the settings of a run."""

    def __init__(self, model: NextStepModel, settings: GenerationSettings, branches: int, like: Tensor) -> None:
        self.head, self.settings, self.branches, self.dtype = model.head, settings, branches, like.dtype
        self.sampler = SAMPLERS[settings.sampler]
        self.times = self.sampler.grid(settings.steps, settings.shift)
        self.draws = self.sampler.draws(settings.steps)
        self.time_codes = self.head.time_embed(torch.tensor(self.times, device=like.device), like.dtype)[:, None]

    def __call__(self, condition: Tensor, noise: Tensor, cfg: float, cfg_img: float) -> Tensor:
        """Tokens (M, token_dim) for condition (branches * M, hidden) and noise (draws, M, token_dim)."""
        modulations = self.head.modulations(self.time_codes, condition)

        def velocity(x: Tensor, i: int) -> Tensor:
            rows = x.to(self.dtype).repeat(self.branches, 1)
            return guide(self.head.velocity(rows, [m[i] for m in modulations]), self.branches, cfg, cfg_img)

        token = self.sampler.integrate(velocity, self.times, noise, ETA).to(self.dtype)
        return normalize_token(token) if self.settings.use_norm else token


def decode_tokens(
    model: NextStepModel,
    embeds: Tensor,
    valid: Tensor,
    grid: tuple[int, int],
    branches: int,
    settings: GenerationSettings,
    noise: NoiseStream,
) -> Iterator[Progress]:
    """Draw the rows * columns tokens of `grid` for every image of the batch, yielding after each.

    embeds (B, L, hidden) and valid (B, L) are the prompts of all branches, stacked as guidance expects them; there are
    M = B / branches images. Everything runs on the device and in the dtype of `embeds`.
    """
    batch, prompt_length, _ = embeds.shape
    total = grid[0] * grid[1]
    length = prompt_length + total - 1  # the last token is never fed back
    cache = KVCache(model.config, batch, length, embeds.device, embeds.dtype)
    rotary = rotary_table(model.config, length, embeds.device, embeds.dtype)
    padded = not bool(valid.all())
    valid = torch.cat([valid, valid.new_ones(batch, total - 1)], dim=1)
    codes = position_codes(model, grid, embeds)
    schedule = SCHEDULES[settings.cfg_schedule]
    draw = TokenSampler(model, settings, branches, like=embeds)
    tokens = embeds.new_zeros(batch // branches, total, model.config.token_dim)

    hidden = prefill(model, embeds, valid[:, :prompt_length], rotary, cache)
    for n in range(total):
        condition = model.image_out_projector(hidden if codes is None else hidden + codes[n])
        cfg, cfg_img = (schedule(value, n, total) for value in (settings.cfg, settings.cfg_img))
        tokens[:, n] = draw(condition, noise.token(draw.draws).to(embeds.device), cfg, cfg_img)
        yield Progress(n + 1, total, tokens)
        if n + 1 < total:
            start = prompt_length + n
            mask = valid[:, None, None, : start + 1] if padded else None
            fed = tokens[:, n : n + 1].repeat(branches, 1, 1)
            hidden = step(model, fed, mask, rotary, cache, start)[:, -1]


def position_codes(model: NextStepModel, grid: tuple[int, int], like: Tensor) -> Tensor | None:
    """What is added to each generated position's hidden state, (rows * columns, hidden), where the model wants it."""
    if not model.config.use_gen_pos_embed:
        return None
    return generation_codes(model.config, grid, model.gen_pos_embed[0]).to(like)
