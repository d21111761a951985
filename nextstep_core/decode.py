"""The decode loop: prompt embeddings in, one image token after another out.

Knows tensors and the model, nothing of text, files, images or progress bars. `decode_tokens` is a generator, so its
caller shows progress, previews and stops between two tokens by what it does with each item.
"""

from __future__ import annotations

import time
from collections import OrderedDict
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

# Long stretches run through the transformer in pieces of this many positions: it bounds the memory of masks and scores.
CHUNK = 1024


@dataclass(frozen=True)
class TokenStep:
    """State after a token: how many of `total` are done, and the buffer (M, total, token_dim).

    The buffer holds known tokens from the start and is zero where a token is still to be drawn.

    Of the done ones `drawn` were drawn (the others were known), `left` are still to be drawn; `seconds` have passed
    since the loop began.
    """

    done: int
    total: int
    tokens: Tensor
    drawn: int
    left: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Drawn tokens per second so far, prefill included."""
        return self.drawn / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float:
        """Time that the tokens still to be drawn will take at this rate."""
        return self.left * self.seconds / self.drawn if self.drawn else 0.0


@dataclass(frozen=True)
class KnownTokens:
    """Tokens that are fed instead of drawn: tokens (M, total, token_dim) and keep (total,) bool, True where known.

    `one_by_one` feeds them as an uninterrupted run would have, which repeats its arithmetic to the last bit; otherwise
    a stretch of known tokens goes through the transformer at once, which is much faster.
    """

    tokens: Tensor
    keep: Tensor
    one_by_one: bool = False

    def fill(self, buffer: Tensor) -> None:
        """Put the known tokens into their places of buffer (M, total, token_dim)."""
        keep = self.keep.to(buffer.device)
        buffer[:, keep] = self.tokens.to(buffer)[:, keep]


class PrefillCache:
    """Keys, values and last hidden states of recent prompts, in host memory, by the content of the prompt."""

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    def restore(self, key: str, cache: KVCache) -> Tensor | None:
        """Fill the front of `cache` and return the last hidden state (B, hidden), or None when `key` is not here."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        kv, hidden = self._entries[key]
        cache.data[..., : kv.shape[-2], :] = kv.to(cache.data.device)
        return hidden.to(cache.data.device)

    def store(self, key: str, cache: KVCache, length: int, hidden: Tensor) -> None:
        """Keep the first `length` positions of `cache`; the oldest entries go when the room is spent."""
        self._entries[key] = (cache.data[..., :length, :].to("cpu", copy=True), hidden.to("cpu", copy=True))
        while sum(kv.nbytes for kv, _ in self._entries.values()) > self.max_bytes:
            self._entries.popitem(last=False)


class TokenSequence:
    """The growing sequence of all rows: prompt, then image tokens, through the transformer and its cache."""

    def __init__(self, model: NextStepModel, embeds: Tensor, valid: Tensor, total: int) -> None:
        batch, prompt_length, _ = embeds.shape
        length = prompt_length + total - 1  # the last token is never fed
        self.model, self.prompt_length = model, prompt_length
        self.cache = KVCache(model.config, batch, length, embeds.device, embeds.dtype)
        self.rotary = rotary_table(model.config, length, embeds.device, embeds.dtype)
        self.padded = not bool(valid.all())
        self.valid = torch.cat([valid, valid.new_ones(batch, total - 1)], dim=1)

    def feed(self, embeds: Tensor, start: int) -> Tensor:
        """Run embeds (B, T, hidden) at positions start..start+T-1; the hidden state (B, hidden) of the last."""
        length = embeds.shape[1]
        mask = None if length == 1 and not self.padded else attention_mask(self.valid, start, length)
        return self.model(embeds, self.rotary[:, start : start + length], mask, self.cache, start)[:, -1]

    def prefill(self, embeds: Tensor, prefilled: PrefillCache | None, key: str) -> Tensor:
        """Run the prompt, or take it from `prefilled`; the hidden state (B, hidden) of its last position."""
        hidden = prefilled.restore(key, self.cache) if prefilled is not None else None
        if hidden is None:
            for start in range(0, self.prompt_length, CHUNK):
                hidden = self.feed(embeds[:, start : start + CHUNK], start)
            if prefilled is not None:
                prefilled.store(key, self.cache, self.prompt_length, hidden)
        return hidden


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
    tokens: Tensor,
    grid: tuple[int, int],
    branches: int,
    settings: GenerationSettings,
    noise: NoiseStream,
    known: KnownTokens | None = None,
    prefilled: PrefillCache | None = None,
    prompt_key: str = "",
) -> Iterator[TokenStep]:
    """Draw the rows * columns tokens of `grid` for every image of the batch, yielding after each.

    embeds (B, L, hidden) and valid (B, L) are the prompts of all branches, stacked as guidance expects them; there are
    M = B / branches images, whose tokens are written into the buffer `tokens` (M, rows * columns, token_dim), on the
    device and in the dtype of `embeds`. Tokens of `known` lie in the buffer already and are kept; their noise is drawn
    all the same, so that every other token sees the noise of its place.
    """
    started, total = time.monotonic(), grid[0] * grid[1]
    keep = [False] * total if known is None else known.keep.tolist()
    to_draw = keep.count(False)
    codes = position_codes(model, grid, embeds)
    schedule = SCHEDULES[settings.cfg_schedule]
    draw = TokenSampler(model, settings, branches, like=embeds)
    sequence = TokenSequence(model, embeds, valid, total)
    chunk = 1 if known is not None and known.one_by_one else CHUNK

    hidden, fed, drawn = sequence.prefill(embeds, prefilled, prompt_key), 0, 0
    for n in range(total):
        token_noise = noise.token(draw.draws)
        if not keep[n]:
            while fed < n:
                new = model.image_in_projector(tokens[:, fed : min(fed + chunk, n)]).repeat(branches, 1, 1)
                hidden, fed = sequence.feed(new, sequence.prompt_length + fed), fed + new.shape[1]
            condition = model.image_out_projector(hidden if codes is None else hidden + codes[n])
            cfg, cfg_img = (schedule(value, n, total) for value in (settings.cfg, settings.cfg_img))
            tokens[:, n] = draw(condition, token_noise.to(embeds.device), cfg, cfg_img)
            drawn += 1
        yield TokenStep(n + 1, total, tokens, drawn, to_draw - drawn, time.monotonic() - started)


def position_codes(model: NextStepModel, grid: tuple[int, int], like: Tensor) -> Tensor | None:
    """What is added to each generated position's hidden state, (rows * columns, hidden), where the model wants it."""
    if not model.config.use_gen_pos_embed:
        return None
    return generation_codes(model.config, grid, model.gen_pos_embed[0]).to(like)
