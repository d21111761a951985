"""What both training loops share besides the optimizer: atomic checkpoints, the device, and one line of progress."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch


def pick_device() -> torch.device:
    """CUDA when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write beside the target and rename, so that a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_if_there(path: Path) -> dict[str, Any] | None:
    """The saved state, or None at the first start."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


class Progress:
    """The clock of a training with a budget in steps or minutes: how much is done, and one line about it.

    `seconds` is what earlier starts of the program have used up.
    """

    def __init__(self, step: int, every: int, *, steps: int | None = None, minutes: float = 0.0, seconds: float = 0.0):
        self.step, self.every, self.steps, self.budget = step, every, steps, 60 * minutes
        self.first_step, self.used, self.start = step, seconds, time.monotonic()
        self.loss: float | None = None

    @property
    def seconds(self) -> float:
        """Time spent in all starts together."""
        return self.used + time.monotonic() - self.start

    @property
    def done(self) -> float:
        """The share of the budget that is spent, 0..1."""
        return min(1.0, self.step / self.steps if self.steps else self.seconds / self.budget)

    def update(self, loss: float) -> None:
        """Call after every step."""
        self.step += 1
        self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        if self.step % self.every == 0:
            self.say(f"loss {self.loss:.4f}")

    def say(self, words: str) -> None:
        """One line with the state of the clock."""
        pace = (time.monotonic() - self.start) / max(1, self.step - self.first_step)
        left = pace * (self.steps - self.step) if self.steps else self.budget - self.seconds
        clock = f"{pace:.3f} s/step, {left / 60:.1f} min left"
        print(f"{self.step:6d} {100 * self.done:5.1f}% {words}  {clock}", flush=True)
