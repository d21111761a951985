"""How far a run is: after each token of the pictures drawn together, and over all pictures of a job."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenStep:
    """State after a token: how many places of `total` are done.

    Of the done ones `sampled` were sampled (the others were known), `left` are still to be; `seconds` have passed
    since the run began. `reads` is how often the weights were read for the sampled ones.
    """

    done: int
    total: int
    sampled: int
    left: int
    seconds: float
    reads: int = 0

    @property
    def tokens_per_read(self) -> float:
        """Sampled tokens for each read of the weights."""
        return self.sampled / self.reads if self.reads else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens per second so far, prefill included."""
        return self.sampled / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float:
        """Time that the tokens still to be sampled will take at this rate."""
        return self.left * self.seconds / self.sampled if self.sampled else 0.0


@dataclass(frozen=True)
class Progress:
    """Where a job stands after a token: pictures start..stop-1 are at `step`, those before are finished.

    tokens is the buffer (pictures, total, token_dim) of the whole job: known tokens from the start, and zero where a
    token is still to be sampled.
    """

    step: TokenStep
    start: int
    stop: int
    tokens: Tensor

    @property
    def total(self) -> int:
        """Token places of one picture."""
        return self.step.total

    @property
    def done(self) -> int:
        """Of `total`, the share that is done, over all pictures of the job."""
        drawn_together = self.stop - self.start
        return (self.start * self.total + drawn_together * self.step.done) // len(self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Token places per second, each for all pictures that are drawn together."""
        return self.step.tokens_per_second

    @property
    def seconds_left(self) -> float:
        """Time until the last picture is done, if all goes on at this rate."""
        together = self.step.seconds + self.step.seconds_left
        return self.step.seconds_left + together * (len(self.tokens) - self.stop) / (self.stop - self.start)
