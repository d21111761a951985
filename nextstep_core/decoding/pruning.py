"""Pictures that are dropped while they are drawn: all are begun, and some go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

from torch import Tensor

from ..errors import NextStepError, shown
from ..images.latents import Grid
from ..ranges import Range
from ..sentences import Sentence

DRAWN = Range(Sentence("The share of a picture that is drawn before some are dropped"), 0.01, 1.0)


@dataclass(frozen=True)
class Pruning:
    """When, and which: `choose` is given what is drawn of all pictures, (B, h, W, 3) float32 in [0, 1] on the CPU, and
    returns the numbers of those that go on, in any order.

    Pictures are drawn from the top. After about `drawn` of their rows, one at least, `choose` sees their upper parts.
    """

    drawn: float
    choose: Callable[[Tensor], Sequence[int]]

    def __post_init__(self) -> None:
        DRAWN.check(self.drawn)

    def rows(self, grid: Grid) -> int:
        """Rows of tokens after which pictures are dropped."""
        return max(1, round(grid[0] * self.drawn))

    def chosen(self, pictures: Tensor) -> list[int]:
        """The pictures that go on; NextStepError when `choose` names none, or what is not there."""
        chosen, numbers = self.choose(pictures), range(len(pictures))
        if not isinstance(chosen, (list, tuple)) or not chosen:
            raise NextStepError("What is to go on is {what}; name at least one picture, in a list.", what=shown(chosen))
        for number in chosen:
            whole = isinstance(number, Integral) and not isinstance(number, bool)
            if not whole or number not in numbers or chosen.count(number) > 1:
                raise NextStepError(
                    "Picture {number} is to go on; use numbers from 0 to {last}, each once.",
                    number=shown(number),
                    last=numbers[-1],
                )
        return [int(number) for number in chosen]
