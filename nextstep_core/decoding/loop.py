"""The decode loop: a job in, one image token after another out.

Knows tensors and the model, nothing of text, files, images or progress bars. The loop is a generator, so its caller
shows progress, previews and stops between two tokens by what it does with each item.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import not_finite
from ..model.nextstep import NextStepModel
from ..sampling.guidance import SCHEDULES
from ..sampling.noise import NoiseStream
from ..sampling.settings import GenerationSettings
from ..sentences import Sentence
from .job import Job
from .prefill import PrefillCache
from .progress import TokenStep
from .steps import CHUNK, StepCaches, StepShape, TokenSampler, TokenSequence


@dataclass(frozen=True)
class Run:
    """A job under way on one device: what any loop over its tokens needs, set up once.

    tokens (M, total, token_dim) is the buffer that is written; `keep` says, of the places to be drawn, which hold known
    tokens already.
    hidden (rows, hidden) is the state after the prompt. codes (total, hidden), where the model wants them, are added to
    the state of every place, guidance (total, 2) holds its scales, and `steps` its flow steps. Known tokens are fed
    `chunk` at a time. `prefilled` keeps the prompt by its `key`.
    """

    sequence: TokenSequence
    sample: TokenSampler
    tokens: Tensor
    keep: list[bool]
    hidden: Tensor
    codes: Tensor | None
    guidance: Tensor
    steps: list[int]
    noise: NoiseStream
    chunk: int
    started: float
    prefilled: PrefillCache | None
    key: str

    @classmethod
    def start(
        cls,
        model: NextStepModel,
        job: Job,
        embeds: Tensor,
        tokens: Tensor,
        caches: StepCaches,
        chunk: int,
        beyond: int = 0,
    ) -> Run:
        """Take or make the steps, and read the prompt; arguments as in `decode` and `StepShape.of_job`."""
        started, total = time.monotonic(), job.total
        sequence, sample = caches.steps(model, StepShape.of_job(job, tokens.device, tokens.dtype, beyond))
        key = "" if caches.prefilled is None else caches.prompt_key(job, tokens.dtype)
        return cls(
            sequence,
            sample,
            tokens,
            ([False] * total if job.known is None else job.known.keep.tolist())[: job.first],
            sequence.prefill(embeds, job.rows.valid.to(tokens.device), caches.prefilled, key, chunk),
            model.position_codes(job.grid, tokens),
            guidance_scales(job.settings, total, tokens.device),
            job.settings.step_counts(total),
            job.noise,
            1 if job.known is not None and job.known.token_by_token else chunk,
            started,
            caches.prefilled,
            key,
        )

    def condition(self, hidden: Tensor, place: int) -> Tensor:
        """What the token at `place` is sampled from, given the hidden states before it."""
        return hidden if self.codes is None else hidden + self.codes[place]

    def step(self, done: int, sampled: int, reads: int | None = None) -> TokenStep:
        """The state after `done` places, of which so many were sampled in so many reads (None: one each)."""
        left = self.keep.count(False) - sampled
        seconds = time.monotonic() - self.started
        return TokenStep(done, len(self.keep), sampled, left, seconds, sampled if reads is None else reads)

    def check_finite(self) -> None:
        """NextStepError, saying where it began, when a token is NaN or infinite.

        Asked once at the end: asking for each token would make a device wait for the host each time.
        """
        if self.tokens.isfinite().all():
            return
        if self.prefilled is not None:
            self.prefilled.forget(self.key)
        if not self.hidden.isfinite().all():
            raise not_finite(Sentence("What the model reads from the prompt"))
        (bad,) = self.tokens.isfinite().all(dim=-1).all(dim=0).logical_not().nonzero(as_tuple=True)
        raise not_finite(Sentence("Token {number} of {count}", number=int(bad[0]) + 1, count=len(self.keep)))


def decode(
    model: NextStepModel, job: Job, embeds: Tensor, tokens: Tensor, caches: StepCaches, chunk: int = CHUNK
) -> Iterator[TokenStep]:
    """Sample the tokens of every picture of `job`, yielding after each.

    embeds (rows, L, hidden) are its prompts, all branches stacked as guidance expects them. Tokens are written into the
    buffer `tokens` (pictures, total, token_dim), whose device and dtype the run computes in. Known tokens lie there
    already and are kept; their noise is drawn all the same, so that every other token sees the noise of its place.
    Of a job of the first places alone, the others stay as they are. Prompts and stretches of known tokens go through
    the transformer `chunk` positions at a time.
    """
    return plain(Run.start(model, job, embeds, tokens, caches, chunk))


def plain(run: Run) -> Iterator[TokenStep]:
    """One token after another: feed what came before, sample the next. NextStepError at the end when one is NaN."""
    hidden, fed, sampled, pace = run.hidden, 0, 0, Pace(run.tokens.device)
    for n, known in enumerate(run.keep):
        noise = run.noise.for_token(run.sample.noise_count)
        if not known:
            while fed < n:
                stretch = run.tokens[:, fed : min(fed + run.chunk, n)]
                hidden, fed = run.sequence.feed(stretch, fed), fed + stretch.shape[1]
            noise = to_device(noise, run.tokens.device)
            run.tokens[:, n] = run.sample(run.condition(hidden, n), noise, run.guidance[n], run.steps[n])
            sampled += 1
        pace.wait()
        yield run.step(n + 1, sampled)
    run.check_finite()


def guidance_scales(settings: GenerationSettings, total: int, device: torch.device) -> Tensor:
    """cfg and cfg_img of every token, (total, 2) float32."""
    schedule = SCHEDULES[settings.cfg_schedule]
    scales = [[schedule(value, n, total) for value in (settings.cfg, settings.cfg_img)] for n in range(total)]
    return torch.tensor(scales, dtype=torch.float32, device=device)


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

    def wait(self) -> None:
        """Wait for what was queued up to the call before this one."""
        if self._before is not None:
            self._before.synchronize()
            self._before = torch.cuda.Event()
            self._before.record()
