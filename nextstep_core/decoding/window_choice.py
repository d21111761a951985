"""How many tokens the next read of the weights draws, by what windows cost and how many guesses were right of late."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FORGET = 0.9  # of what was learned, what is kept after each window


@dataclass
class WindowChoice:
    """Chooses the size of each window: of those in `costs`, which tells what a read with so many places takes, the one
    that is expected to bring the most tokens in the time. `right` of `examined` guesses were right of late."""

    costs: Mapping[int, float]
    right: float = 4.0
    examined: float = 5.0

    def size(self) -> int:
        """How many places the next window has."""
        share = self.right / self.examined
        return max(self.costs, key=lambda size: sum(share**n for n in range(size)) / self.costs[size])

    def learn(self, right: int, examined: int) -> None:
        """Take into account how many guesses of a window were looked at, up to the first wrong one."""
        self.right = FORGET * self.right + right
        self.examined = FORGET * self.examined + examined
