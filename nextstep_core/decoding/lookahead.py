"""Several image tokens per read of the weights: the chain of tokens solved as a fixed-point problem, window by window.

With the noise of every place fixed beforehand, a token is a deterministic function of those before it. So a window of
places is guessed, goes through the transformer at once, and every token of it is drawn with its own noise (Jacobi
iteration with common random numbers). Those whose inputs were right are done, the others are the next guess. The first
of a window is always right: there are never more reads than tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .loop import Run, to_device
from .progress import TokenStep


def ahead(run: Run, columns: int, window: int, tolerance: float) -> Iterator[TokenStep]:
    """As `loop.plain`, with `window` places at a time, of pictures that are `columns` tokens wide.

    A guess is right when it is no further from the token that was drawn in its place than `tolerance`, relative to that
    token's length. Pictures advance on their own. NextStepError at the end when a token is NaN.
    """
    state = Windows(run, columns, window)
    yield from state.begin()
    while state.first < len(run.keep):
        state.advance(tolerance)
        yield run.step(state.first, run.keep[: state.first].count(False))
    run.check_finite()


class Windows:
    """The windows of all pictures of a run: where each begins, what stands in it, and the noise of its places."""

    def __init__(self, run: Run, columns: int, window: int) -> None:
        self.run, self.columns, self.window = run, columns, window
        pictures, total, dim = run.tokens.shape
        device = run.tokens.device
        self.total = len(run.keep)
        self.guess = torch.zeros(pictures, total + 2 * window, dim, device=device, dtype=run.tokens.dtype)
        self.done = [0] * pictures
        self.valued = [0] * pictures  # places that were drawn or guessed
        self.offsets = torch.arange(window, device=device)
        self.keep = torch.zeros(total + 2 * window, dtype=torch.bool, device=device)
        self.keep[: self.total] = torch.tensor(run.keep, device=device)
        self.noises: dict[int, Tensor] = {}
        self.drawn_noises = 0
        self.reads = 0

    @property
    def first(self) -> int:
        """Places that are done in every picture."""
        return min(self.done)

    def begin(self) -> Iterator[TokenStep]:
        """Feed what is known from the start, or sample the very first token from the prompt alone."""
        run, known = self.run, 0
        while known < self.total and run.keep[known]:
            known += 1
        if known == 0:
            run.tokens[:, 0] = run.sample(run.condition(run.hidden, 0), self._noise(0), run.guidance[0])
            known = 1
        fed = 0
        while fed < known - 1:
            stretch = run.tokens[:, fed : min(fed + run.chunk, known - 1)]
            run.sequence.feed(stretch, fed)
            fed += stretch.shape[1]
        self.guess[:, : self.total] = run.tokens[:, : self.total]
        self.done = [known] * len(self.done)
        self.valued = list(self.done)
        yield run.step(known, run.keep[:known].count(False))

    def advance(self, tolerance: float) -> None:
        """One read of the weights: draw every picture's window, keep what was right, and guess the rest anew."""
        run, window = self.run, self.window
        pictures = len(self.done)
        self._guess_new()
        begin = torch.tensor(self.done, device=run.tokens.device)
        places = begin[:, None] + self.offsets  # (M, W)
        row = torch.arange(pictures, device=places.device)[:, None]
        hidden = run.sequence.feed_window(self.guess[row, places - 1], places - 1, max(self.done) + window - 2)
        inside = places.clamp(max=self.total - 1)
        if run.codes is not None:
            hidden = hidden + run.codes[inside].repeat(len(hidden) // pictures, 1, 1)
        noise = torch.stack([self._noises(m) for m in range(pictures)], dim=1).flatten(1, 2)  # (count, M * W, D)
        guidance = run.guidance[inside].flatten(0, 1).T[..., None]  # (2, M * W, 1)
        drawn = run.sample(hidden.flatten(0, 1), noise, guidance).view(pictures, window, -1)
        before = self.guess[row, places]
        drawn = torch.where(self.keep[places][..., None], before, drawn)
        change = (drawn - before).float().norm(dim=-1) / drawn.float().norm(dim=-1).clamp_min(1e-6)
        right = (change <= tolerance)[:, :-1].long().cumprod(dim=1).sum(dim=1) + 1
        self.guess[row, places] = drawn
        self.reads += 1
        for m, count in enumerate(right.tolist()):
            start, stop = self.done[m], min(self.done[m] + count, self.total)
            run.tokens[m, start:stop] = self.guess[m, start:stop]
            self.valued[m] = max(self.valued[m], start + window)
            self.done[m] = stop
        for place in [place for place in self.noises if place < self.first]:
            del self.noises[place]

    def _guess_new(self) -> None:
        """First guesses of the places that a window has come to: the token above, or the last one there is."""
        for m, start in enumerate(self.done):
            for place in range(max(self.valued[m], start), start + self.window):
                if not (place < self.total and self.run.keep[place]):
                    above = place - self.columns
                    self.guess[m, place] = self.guess[m, above if above >= 0 else place - 1]
            self.valued[m] = max(self.valued[m], start + self.window)

    def _noises(self, picture: int) -> Tensor:
        """(count, W, D) of a picture's window; beyond the end the last place's."""
        places = (min(self.done[picture] + n, self.total - 1) for n in range(self.window))
        return torch.stack([self._noise(place)[:, picture] for place in places], dim=1)

    def _noise(self, place: int) -> Tensor:
        """Every noise of one place, (count, M, D), drawn in the order of the places."""
        while self.drawn_noises <= place:
            noise = self.run.noise.for_token(self.run.sample.noise_count)
            self.noises[self.drawn_noises] = to_device(noise, self.run.tokens.device)
            self.drawn_noises += 1
        return self.noises[place]
