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
from .job import Job, picked

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

    def rest(self, job: Job, draw: Callable[[Job], Tensor], decode: Callable[[Tensor, Grid], Tensor]) -> Job:
        """Begin all pictures of a job; the job of those that go on. Only their rows are in its KV cache.

        `draw` gives a job's tokens (pictures, total, token_dim), and `decode` pictures from tokens of a grid.
        """
        grid = self.rows(job.grid), job.grid[1]
        places = grid[0] * grid[1]
        tokens = draw(job.begun(places))
        chosen = self.chosen(decode(tokens[:, :places], grid))
        return job.part(chosen).after(picked(tokens, chosen), places)

    def chosen(self, pictures: Tensor) -> list[int]:
        """The pictures that go on; NextStepError when `choose` names none, or what is not there."""
        chosen, numbers = self.choose(pictures), range(len(pictures))
        if not isinstance(chosen, (list, tuple)) or not chosen:
            raise NextStepError(
                "What is to go on is {value}; name at least one picture, in a list.", value=shown(chosen)
            )
        for number in chosen:
            whole = isinstance(number, Integral) and not isinstance(number, bool)
            if not whole or number not in numbers or chosen.count(number) > 1:
                raise NextStepError(
                    "Picture {number} is to go on; use numbers from 0 to {most}, each once.",
                    number=shown(number),
                    most=numbers[-1],
                )
        return [int(number) for number in chosen]
