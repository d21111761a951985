"""The clock around the parts of a picture: prefill, transformer step, sampling from the head, the VAE, and the whole.

Prompts are random ids of a given length: what they say does not change the cost.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nextstep_core.decoding.job import Job
from nextstep_core.decoding.loop import guidance_scales
from nextstep_core.decoding.steps import StepCaches, StepShape
from nextstep_core.images.latents import LatentSpace
from nextstep_core.images.tiling import run_in_tiles
from nextstep_core.request.layout import PromptRows
from nextstep_core.runtime.bandwidth import timed
from nextstep_core.sampling.noise import NoiseStream
from nextstep_core.sampling.settings import GenerationSettings

from .subjects import Subject

PARTS = 16  # places at which the parts are timed when whole pictures are drawn as well


@dataclass(frozen=True)
class Case:
    """One setting of everything that cost depends on. `graphs` None runs every step as it is."""

    subject: Subject
    width: int
    height: int
    batch: int
    settings: GenerationSettings
    prompt_length: int
    device: torch.device
    dtype: torch.dtype
    caches: StepCaches

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of tokens."""
        return self.latents.grid(self.height, self.width)

    @property
    def latents(self) -> LatentSpace:
        """The space of the subject's latents."""
        return self.subject.engine.latents

    @property
    def tokens(self) -> int:
        """Tokens of one picture."""
        return self.grid[0] * self.grid[1]

    @property
    def branches(self) -> int:
        """Guidance branches."""
        return 2 if self.settings.cfg > 1 else 1

    @property
    def rows(self) -> int:
        """Rows of the transformer's batch."""
        return self.branches * self.batch

    @property
    def calls(self) -> int:
        """Network calls of the head per token."""
        return self.settings.calls(self.tokens)

    def prompt_ids(self) -> Tensor:
        """(branches, prompt_length) ids, the last one begin-of-image."""
        config = self.subject.config
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (self.branches, self.prompt_length), generator=generator)
        ids[:, -1] = config.boi
        return ids

    def job(self, seed: int) -> Job:
        """The pictures to be drawn."""
        ids = self.prompt_ids().repeat_interleave(self.batch, dim=0)
        rows = PromptRows(ids, torch.ones_like(ids, dtype=torch.bool), ((),) * len(ids), self.branches)
        noise = NoiseStream(seed, 1, self.batch, self.subject.config.token_dim)
        return Job(rows, self.grid, self.settings, noise)

    @property
    def captures(self) -> bool:
        """Whether the work of a token is captured here."""
        graphs = self.caches.graphs
        return graphs is not None and graphs.supports(self.device)


def draw_tokens(case: Case, seed: int) -> Tensor:
    """The tokens (batch, tokens, token_dim) of whole pictures, prefill included."""
    engine = replace(case.subject.engine, caches=case.caches)
    *_, progress = engine.decode(case.job(seed), case.device, case.dtype)
    return progress.tokens


def decode_pictures(case: Case, tokens: Tensor) -> Tensor:
    """Pixels of tokens (M, tokens, token_dim)."""
    latents = case.latents.to_latents(tokens.float(), case.grid)
    return case.subject.vae.decode(latents.to(case.dtype), run_in_tiles)


def evenly_spaced(places: int, count: int) -> list[int]:
    """`count` of `places` places (all where there are fewer), evenly over the whole."""
    count = min(places, count)
    return [int((i + 0.5) * places / count) for i in range(count)]


@torch.inference_mode()
def time_parts(case: Case, count: int) -> dict[str, float]:
    """Seconds of the whole prefill, and of the step and the sampling of a token, as means over `count` places.

    The places lie evenly over the picture, so that the growing KV cache counts with its mean length.
    """
    device, total, job = case.device, case.tokens, case.job(seed=0)
    embeds = case.subject.engine.embed(job.rows, device, case.dtype)
    sequence, sample = case.caches.steps(case.subject.model, StepShape.of_job(job, device, case.dtype))
    valid = job.rows.valid.to(device)
    prefill, hidden = timed(device, lambda: sequence.prefill(embeds, valid, None, ""))
    noise = job.noise.for_token(sample.noise_count).to(device)
    guidance = guidance_scales(case.settings, total, device)[0]
    steps, head, transformer = case.settings.step_counts(total), [], []
    for place in evenly_spaced(max(1, total - 1), count):
        seconds, token = timed(device, partial(sample, hidden, noise, guidance, steps[place]))
        head.append(seconds)
        seconds, hidden = timed(device, partial(sequence.feed, token[:, None], place))
        transformer.append(seconds)
    return {"prefill": prefill, "transformer": statistics.mean(transformer), "head": statistics.mean(head)}


@torch.inference_mode()
def time_picture(case: Case, seed: int) -> tuple[float, Tensor]:
    """Seconds of the decode loop for whole pictures, and their tokens."""
    return timed(case.device, lambda: draw_tokens(case, seed))


@torch.inference_mode()
def time_run(case: Case, only: int | None, seed: int) -> dict[str, float]:
    """One run of everything, in seconds. `only` times that many tokens, and one picture of the VAE, and scales up."""
    scaled = only is not None and only < case.tokens
    parts = time_parts(case, only if scaled else PARTS)
    if scaled:
        loop = parts["prefill"] + case.tokens * parts["head"] + (case.tokens - 1) * parts["transformer"]
        tokens = torch.randn(1, case.tokens, case.subject.config.token_dim, device=case.device)
    else:
        loop, tokens = time_picture(case, seed)
    vae = timed(case.device, lambda: decode_pictures(case, tokens))[0] / len(tokens)
    return {
        "prefill_position": parts["prefill"] / case.prompt_length,
        "transformer": parts["transformer"],
        "head": parts["head"],
        "token": (loop - parts["prefill"]) / case.tokens,
        "vae_token": vae / case.tokens,
        "vae_picture": vae,
        "picture": loop / case.batch + vae,
        "tokens_per_second": case.batch * case.tokens / loop,
    }


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def measure(case: Case, repeat: int, warmup: int = 1, only: int | None = None) -> dict[str, dict[str, float]]:
    """Median and range of every number of `time_run` over `repeat` runs, after `warmup` that do not count."""
    runs = [time_run(case, only, seed) for seed in range(warmup + repeat)][warmup:]
    return {name: summary([run[name] for run in runs]) for name in runs[0]}
