"""The decode loop: prompt embeddings in, one image token after another out.

Knows tensors and the model, nothing of text, files, images or progress bars. `decode_tokens` is a generator, so its
caller shows progress, previews and stops between two tokens by what it does with each item.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.nextstep import NextStepModel
from ..model.positions import generation_codes
from ..runtime.graphs import StepGraphs
from ..sampling.guidance import SCHEDULES
from ..sampling.noise import NoiseStream
from ..sampling.settings import GenerationSettings
from .steps import CHUNK, PrefillCache, make_steps


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
    graphs: StepGraphs | None = None,
) -> Iterator[TokenStep]:
    """Draw the rows * columns tokens of `grid` for every image of the batch, yielding after each.

    embeds (B, L, hidden) and valid (B, L) are the prompts of all branches, stacked as guidance expects them; there are
    M = B / branches images, whose tokens are written into the buffer `tokens` (M, rows * columns, token_dim), on the
    device and in the dtype of `embeds`. Tokens of `known` lie in the buffer already and are kept; their noise is drawn
    all the same, so that every other token sees the noise of its place. `graphs` replays the work of a token instead of
    launching it anew.
    """
    started, total = time.monotonic(), grid[0] * grid[1]
    keep = [False] * total if known is None else known.keep.tolist()
    to_draw = keep.count(False)
    codes = position_codes(model, grid, embeds)
    guidance = guidance_scales(settings, total, embeds.device)
    length = embeds.shape[1] + total - 1  # the last token is never fed
    sequence, draw = make_steps(model, len(embeds), length, settings, branches, embeds, graphs)
    chunk = 1 if known is not None and known.one_by_one else CHUNK
    pace = Pace(embeds.device)

    hidden, fed, drawn = sequence.prefill(embeds, valid, prefilled, prompt_key), 0, 0
    for n in range(total):
        token_noise = noise.token(draw.draws)
        if not keep[n]:
            while fed < n:
                stretch = tokens[:, fed : min(fed + chunk, n)]
                hidden, fed = sequence.feed(stretch, fed), fed + stretch.shape[1]
            at_place = hidden if codes is None else hidden + codes[n]
            tokens[:, n] = draw(at_place, to_device(token_noise, embeds.device), guidance[n])
            drawn += 1
        pace.keep()
        yield TokenStep(n + 1, total, tokens, drawn, to_draw - drawn, time.monotonic() - started)


def guidance_scales(settings: GenerationSettings, total: int, device: torch.device) -> Tensor:
    """cfg and cfg_img of every token, (total, 2) float32."""
    schedule = SCHEDULES[settings.cfg_schedule]
    scales = [[schedule(value, n, total) for value in (settings.cfg, settings.cfg_img)] for n in range(total)]
    return torch.tensor(scales, dtype=torch.float32, device=device)


def position_codes(model: NextStepModel, grid: tuple[int, int], like: Tensor) -> Tensor | None:
    """What is added to each generated position's hidden state, (rows * columns, hidden), where the model wants it."""
    if not model.config.use_gen_pos_embed:
        return None
    return generation_codes(model.config, grid, model.gen_pos_embed[0]).to(like)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Host values on `device`; a CUDA device takes them while it works on something else."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class Pace:
    """Lets the host run at most one token ahead of a CUDA device.

    The device is never idle, and yet progress, preview and a stop between two tokens tell of work that is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._before = torch.cuda.Event() if device.type == "cuda" else None

    def keep(self) -> None:
        """Wait for what was queued up to the call before this one."""
        if self._before is not None:
            self._before.synchronize()
            self._before = torch.cuda.Event()
            self._before.record()
