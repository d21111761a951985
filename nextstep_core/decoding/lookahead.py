"""Several image tokens per read of the weights: the chain of tokens solved as a fixed-point problem, window by window.

With the noise of every place fixed beforehand, a token is a deterministic function of those before it. So a window of
places is guessed, goes through the transformer at once, and every token of it is drawn with its own noise: Jacobi
iteration with common random numbers (Song et al. 2021; for discrete tokens Teng et al. 2024, arXiv 2410.01699). Those
whose inputs were right are done, the others are the next guess. The first of a window is always right, so there are
never more reads than tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..model.nextstep import NextStepModel
from .job import Job
from .loop import Run, plain, to_device
from .progress import TokenStep
from .steps import StepCaches, StepShape
from .window_choice import WindowChoice

# How far a guess may be from the token that is drawn in its place, relative to that token's length, to count as right.
TOLERANCES = {"exact": 1e-5, "fast": 0.1}
SIZES = (1, 2, 4, 8, 16, 32)  # of windows, in places: few, since each is captured once
MOST = SIZES[-1]
WORTH = 0.9  # of the cost of a place, what it must fall to for a window of twice the size to be tried at all
QUICK, REPEATED = 0.1, 3  # seconds; of what takes longer the second call counts, of what does not the best of so many


def look_ahead(
    model: NextStepModel, job: Job, embeds: Tensor, tokens: Tensor, caches: StepCaches, chunk: int
) -> Iterator[TokenStep]:
    """As `loop.decode`, several tokens at a time, within the tolerance of the job's settings.

    Pictures advance on their own; each step tells of the one that is furthest behind. What windows cost and bring is
    learned in the first run of a shape; where they do not pay, the next ones go token by token.
    """
    run = Run.start(model, job, embeds, tokens, caches, chunk, beyond=MOST)
    key = StepShape.of_job(job, tokens.device, tokens.dtype, MOST), job.settings.lookahead
    choice = caches.windows.get(key)
    if choice is not None and choice.size() == 1:
        yield from plain(run)
        return
    windows = Windows(run, job.grid[1])
    yield from windows.begin()
    if choice is None and windows.first < windows.total:
        choice = caches.windows[key] = WindowChoice(measured(windows.read_one, windows.read))
    yield from ahead(windows, choice or WindowChoice({1: 1.0}), TOLERANCES[job.settings.lookahead])


def ahead(windows: Windows, choice: WindowChoice, tolerance: float) -> Iterator[TokenStep]:
    """Solve window after window to the end. NextStepError then, when a token is NaN."""
    run = windows.run
    while windows.first < windows.total:
        choice.learn(*windows.advance(choice.size(), tolerance))
        yield windows.step()
    run.check_finite()


def measured(read_one: Callable[[], Tensor], read: Callable[[int], Tensor]) -> dict[int, float]:
    """What a read takes, in seconds: of one token as the plain loop draws it, and of windows of those sizes that may
    pay on this device."""
    costs = {1: _seconds(read_one)}
    for size in SIZES[1:]:
        costs[size] = _seconds(partial(read, size))
        if size > 2 and costs[size] > WORTH * 2 * costs[size // 2]:
            break
    return costs


def _seconds(read: Callable[[], Tensor]) -> float:
    """The least of a few calls. The first may have tried kernels, compiled them or captured the work, which can take
    longer than a picture's worth of reads, so it never stands alone."""
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < REPEATED and seconds[-1] < QUICK):
        started = time.perf_counter()
        read().flatten()[0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return min(seconds)


class Windows:
    """The windows of all pictures of a run: where each begins, what stands in it, and the noise of its places."""

    def __init__(self, run: Run, columns: int) -> None:
        """`columns` is how many tokens wide the pictures are."""
        self.run, self.columns, self.total = run, columns, len(run.keep)
        pictures, total, dim = run.tokens.shape
        device = run.tokens.device
        self.guess = torch.zeros(pictures, total + 2 * MOST, dim, device=device, dtype=run.tokens.dtype)
        self.known = torch.zeros(total + 2 * MOST, dtype=torch.bool, device=device)
        self.known[: self.total] = torch.tensor(run.keep, device=device)
        self.rows = torch.arange(pictures, device=device)[:, None]
        self.done = [0] * pictures
        self.guessed = [0] * pictures  # places that hold a token or a guess
        self.noises: dict[int, Tensor] = {}
        self.next_noise = 0
        self.reads = 0

    @property
    def first(self) -> int:
        """Places that are done in every picture."""
        return min(self.done)

    def step(self) -> TokenStep:
        """Where the run stands."""
        return self.run.step(self.first, self.run.keep[: self.first].count(False), self.reads)

    def begin(self) -> Iterator[TokenStep]:
        """Feed what is known from the start; where nothing is, sample the very first token from the prompt alone."""
        run = self.run
        known = run.keep.index(False) if False in run.keep else self.total
        if known == 0:
            run.tokens[:, 0] = run.sample(run.condition(run.hidden, 0), self._noise(0), run.guidance[0], run.steps[0])
            known, self.reads = 1, 1
        for start in range(0, known - 1, run.chunk):
            run.sequence.feed(run.tokens[:, start : min(start + run.chunk, known - 1)], start)
        self.guess[:, : run.tokens.shape[1]] = run.tokens
        self.done = [known] * len(self.done)
        self.guessed = list(self.done)
        yield self.step()

    def read(self, size: int) -> Tensor:
        """One read of the weights: tokens (M, size, token_dim) of every picture's window, drawn from the guesses."""
        run, pictures = self.run, len(self.done)
        places = self._places(size)
        hidden = run.sequence.feed_window(self.guess[self.rows, places - 1], places - 1, max(self.done) + size - 2)
        inside = places.clamp(max=self.total - 1)
        if run.codes is not None:
            hidden = hidden + run.codes[inside].repeat(len(hidden) // pictures, 1, 1)
        noise = torch.stack([self._noise_of(m, size) for m in range(pictures)], dim=1).flatten(1, 2)
        guidance = run.guidance[inside].flatten(0, 1).T[..., None]  # (2, M * size, 1)
        drawn = self._drawn(hidden.flatten(0, 1), noise, guidance, size).view(pictures, size, -1)
        return torch.where(self.known[places][..., None], self.guess[self.rows, places], drawn)

    def read_one(self) -> Tensor:
        """What the plain loop does for the first picture's next token, whose result is not used."""
        run, place = self.run, self.first
        hidden = run.sequence.feed(self.guess[:, place - 1 : place], place - 1)
        noise = self._noise(min(place, self.total - 1))
        return run.sample(run.condition(hidden, place), noise, run.guidance[place], run.steps[place])

    def _drawn(self, hidden: Tensor, noise: Tensor, guidance: Tensor, size: int) -> Tensor:
        """All tokens of all windows. Where they differ in their flow steps, all are drawn with each number of steps, so
        that the work keeps its shape; these falls are few."""
        steps = [self.run.steps[min(start + n, self.total - 1)] for start in self.done for n in range(size)]
        first, *others = sorted(set(steps))
        drawn = self.run.sample(hidden, noise, guidance, first)
        for count in others:
            here = torch.tensor([own == count for own in steps], device=hidden.device)[:, None]
            drawn = torch.where(here, self.run.sample(hidden, noise, guidance, count), drawn)
        return drawn

    def advance(self, size: int, tolerance: float) -> tuple[int, int]:
        """Draw a window of every picture, keep what is right and guess the rest anew: of how many guesses that were
        looked at how many were right."""
        self._guess_new(size)
        places = self._places(size)
        guess, drawn = self.guess[self.rows, places], self.read(size)
        self.guess[self.rows, places] = drawn
        self.reads += 1
        change = (drawn - guess).float().norm(dim=-1) / drawn.float().norm(dim=-1).clamp_min(1e-6)
        # A token is right when everything before it in the window was guessed right.
        leading = (change <= tolerance)[:, : size - 1].long().cumprod(dim=1).sum(dim=1).tolist()
        for m, right in enumerate(leading):
            start, stop = self.done[m], min(self.done[m] + right + 1, self.total)
            self.run.tokens[m, start:stop] = drawn[m, : stop - start]
            self.guessed[m] = max(self.guessed[m], start + size)
            self.done[m] = stop
        for place in [place for place in self.noises if place < self.first]:
            del self.noises[place]
        return sum(leading), sum(min(right + 1, size - 1) for right in leading)

    def _places(self, size: int) -> Tensor:
        """(M, size): where each picture's window lies."""
        begin = torch.tensor(self.done, device=self.guess.device)
        return begin[:, None] + torch.arange(size, device=begin.device)

    def _guess_new(self, size: int) -> None:
        """Guess the places that a window comes to and that are not known."""
        for m, start in enumerate(self.done):
            for place in range(max(self.guessed[m], start), start + size):
                if not (place < self.total and self.run.keep[place]):
                    self.guess[m, place] = self.first_guess(m, place)
            self.guessed[m] = max(self.guessed[m], start + size)

    def first_guess(self, picture: int, place: int) -> Tensor:
        """What stands in a place before it is drawn: the token above or, in the first row, the one before."""
        return self.guess[picture, place - (self.columns if place >= self.columns else 1)]

    def _noise_of(self, picture: int, size: int) -> Tensor:
        """(count, size, token_dim) of a picture's window; beyond the end the last place's."""
        places = (min(self.done[picture] + n, self.total - 1) for n in range(size))
        return torch.stack([self._noise(place)[:, picture] for place in places], dim=1)

    def _noise(self, place: int) -> Tensor:
        """Every noise of one place, (count, M, token_dim); the stream is drawn in the order of the places."""
        while self.next_noise <= place:
            noise = self.run.noise.for_token(self.run.sample.noise_count)
            self.noises[self.next_noise] = to_device(noise, self.run.tokens.device)
            self.next_noise += 1
        return self.noises[place]
