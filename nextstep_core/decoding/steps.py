"""The work of one image token in two halves: the transformer's step over its cache, and the draw from the flow head.

Both are functions of tensors whose shapes do not change from token to token, so that they may be captured and replayed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from ..model.kv_cache import KVCache, bucketed
from ..model.nextstep import NextStepModel
from ..model.positions import rotary_table
from ..model.transformer import span_at
from ..runtime.graphs import Step, StepGraphs
from ..sampling.guidance import guide
from ..sampling.settings import GenerationSettings
from ..sampling.solvers import ETA, SAMPLERS, normalize_token

# Long stretches run through the transformer in pieces of this many positions: it bounds the memory of masks and scores.
CHUNK = 1024

Wrap: TypeAlias = Callable[[Step], Step]


def as_it_is(step: Step) -> Step:
    """The wrap that changes nothing."""
    return step


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
    """The growing sequence of all rows: prompt, then image tokens, through the transformer and its cache.

    Its memory is made once, for `batch` rows of up to `length` positions, and serves any number of runs. `wrap` may
    replace the step of one token by one that does the same faster.
    """

    def __init__(self, model: NextStepModel, batch: int, length: int, device, dtype, wrap: Wrap = as_it_is) -> None:
        self.model, self.prompt_length = model, 0
        self.cache = KVCache(model.config, batch, length, device, dtype)
        self.rotary = rotary_table(model.config, bucketed(length), device, dtype)
        self.positions = torch.arange(bucketed(length), device=device)
        self.valid = torch.ones(batch, bucketed(length), dtype=torch.bool, device=device)
        self._step = wrap(self._advance)

    def prefill(self, embeds: Tensor, valid: Tensor, prefilled: PrefillCache | None, key: str) -> Tensor:
        """Begin with the prompt embeds (B, L, hidden), or take it from `prefilled`; the last hidden state (B, hidden).

        valid (B, L) is False at left padding.
        """
        self.prompt_length = embeds.shape[1]
        self.valid[:, : self.prompt_length] = valid
        self.valid[:, self.prompt_length :] = True
        hidden = prefilled.restore(key, self.cache) if prefilled is not None else None
        if hidden is None:
            for start in range(0, self.prompt_length, CHUNK):
                hidden = self._run(embeds[:, start : start + CHUNK], start)
            if prefilled is not None:
                prefilled.store(key, self.cache, self.prompt_length, hidden)
        return hidden

    def feed(self, tokens: Tensor, place: int) -> Tensor:
        """Run image tokens (M, T, token_dim), which stand at place..place+T-1; the last hidden state (B, hidden)."""
        start = self.prompt_length + place
        if tokens.shape[1] == 1:
            return self._step(tokens, self.positions[start : start + 1], visible=bucketed(start + 1))
        return self._run(self._project(tokens), start)

    def _run(self, embeds: Tensor, start: int) -> Tensor:
        end = start + embeds.shape[1]
        span = span_at(self.positions[start:end], self.rotary, self.valid, bucketed(end))
        return self.model(embeds, span, self.cache)[:, -1]

    def _advance(self, token: Tensor, position: Tensor, visible: int) -> Tensor:
        span = span_at(position, self.rotary, self.valid, visible)
        return self.model(self._project(token), span, self.cache)[:, -1]

    def _project(self, tokens: Tensor) -> Tensor:
        return self.model.image_in_projector(tokens).repeat(len(self.valid) // len(tokens), 1, 1)


class TokenSampler:
    """Draws one token per image from the flow head, with the settings of a run. `wrap` as in TokenSequence."""

    def __init__(
        self, model: NextStepModel, settings: GenerationSettings, branches: int, device, dtype, wrap: Wrap = as_it_is
    ) -> None:
        self.model, self.head, self.settings, self.branches, self.dtype = model, model.head, settings, branches, dtype
        self.sampler = SAMPLERS[settings.sampler]
        self.times = self.sampler.grid(settings.steps, settings.shift)
        self.draws = self.sampler.draws(settings.steps)
        self.time_codes = self.head.time_embed(torch.tensor(self.times, device=device), dtype)[:, None]
        self._draw = wrap(self._integrate)

    def __call__(self, hidden: Tensor, noise: Tensor, guidance: Tensor) -> Tensor:
        """Tokens (M, token_dim) for the hidden states (branches * M, hidden), noise (draws, M, token_dim) and the
        scales cfg and cfg_img as a tensor (2,)."""
        return self._draw(hidden, noise, guidance)

    def _integrate(self, hidden: Tensor, noise: Tensor, guidance: Tensor) -> Tensor:
        modulations = self.head.modulations(self.time_codes, self.model.image_out_projector(hidden))

        def velocity(x: Tensor, i: int) -> Tensor:
            rows = x.to(self.dtype).repeat(self.branches, 1)
            return guide(self.head.velocity(rows, [m[i] for m in modulations]), self.branches, *guidance)

        token = self.sampler.integrate(velocity, self.times, noise, ETA).to(self.dtype)
        return normalize_token(token) if self.settings.use_norm else token


def make_steps(
    model: NextStepModel,
    batch: int,
    length: int,
    settings: GenerationSettings,
    branches: int,
    like: Tensor,
    graphs: StepGraphs | None,
) -> tuple[TokenSequence, TokenSampler]:
    """The two halves of a token's work for sequences of `length`, taken from `graphs` where it has them captured."""

    def make(wrap: Wrap) -> tuple[TokenSequence, TokenSampler]:
        return (
            TokenSequence(model, batch, length, like.device, like.dtype, wrap),
            TokenSampler(model, settings, branches, like.device, like.dtype, wrap),
        )

    if graphs is None:
        return make(as_it_is)
    drawing = replace(settings, cfg=0.0, cfg_img=0.0, cfg_schedule="")  # the scales are inputs of every token
    return graphs.steps((batch, bucketed(length), drawing, branches, like.device, like.dtype), make)
