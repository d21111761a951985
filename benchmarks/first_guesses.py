"""What a window's places may hold before they are drawn, to be compared by how many tokens a read then brings."""

from __future__ import annotations

from torch import Tensor

from nextstep_core.decoding.lookahead import Windows

DRAFT_STEPS = 4


class Before(Windows):
    """The token before."""

    def first_guess(self, picture: int, place: int) -> Tensor:
        return self.guess[picture, place - 1]


class Line(Before):
    """The two before, continued in a straight line."""

    def first_guess(self, picture: int, place: int) -> Tensor:
        if place < 2:
            return super().first_guess(picture, place)
        return 2 * self.guess[picture, place - 1] - self.guess[picture, place - 2]


class Plane(Before):
    """The one before, and what changed beside it in the row above."""

    def first_guess(self, picture: int, place: int) -> Tensor:
        before = super().first_guess(picture, place)
        if place <= self.columns:
            return before
        above = place - self.columns
        return before + self.guess[picture, above] - self.guess[picture, above - 1]


class Draft(Before):
    """A draw with few steps from the last condition that there is, with the place's own noise."""

    def __init__(self, run, columns: int) -> None:
        super().__init__(run, columns)
        self.hidden: Tensor | None = None

    def first_guess(self, picture: int, place: int) -> Tensor:
        if self.hidden is None:
            return super().first_guess(picture, place)
        last = self.hidden.unflatten(0, (-1, len(self.done)))[:, picture, -1]
        noise = self._noise(min(place, self.total - 1))[:, picture, None]
        return self.run.sample(last, noise, self.run.guidance[0], DRAFT_STEPS)[0]

    def read(self, size: int) -> Tensor:
        feed = self.run.sequence.feed_window

        def kept(*inputs) -> Tensor:
            self.hidden = feed(*inputs)
            return self.hidden

        self.run.sequence.feed_window = kept
        try:
            return super().read(size)
        finally:
            del self.run.sequence.feed_window


class Refreshed(Windows):
    """The token above, as it is; and the keys and values of as many tokens before the window are made anew, from what
    was drawn in place of what was guessed."""

    def read(self, size: int) -> Tensor:
        places = (self._places(size) - 1 - size).clamp(min=0)
        self.run.sequence.feed_window(self.guess[self.rows, places], places, max(self.done))
        return super().read(size)


FIRST_GUESSES: dict[str, type[Windows]] = {
    "the token above": Windows,
    "the one before": Before,
    "the two before in a line": Line,
    "the plane through three": Plane,
    f"{DRAFT_STEPS} steps from the last condition": Draft,
    "the token above, keys and values refreshed": Refreshed,
}
